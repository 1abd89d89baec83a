//! Finding the beginnings of patterns in a stream, fast.
//!
//! Each pattern begins with one of a few fixed words, its anchors. Of every second place of the stream, the two
//! bytes there are looked up in a table: wherever an anchor begins, one of its first two pairs of bytes stands at
//! such a place. Only where the table says so is anything compared.

use super::patterns::Pattern;

/// How much behind an anchor a pattern may look at: no secret is longer for us.
pub const AHEAD: usize = 1024;

/// Where a pair of bytes may stand in an anchor.
struct Candidate {
    pattern: usize,
    anchor: Vec<u8>,
    any_case: bool,
    /// 0 or 1: the offset of the pair in the anchor.
    offset: usize,
}

/// A search in a stream that comes in pieces.
pub struct Search {
    patterns: Vec<Pattern>,
    /// For each pair of bytes, 0 or one more than an index into `buckets`.
    table: Vec<u16>,
    buckets: Vec<Vec<Candidate>>,
    /// A byte that was searched already, if there is one before, and what was not.
    buffer: Vec<u8>,
    /// How much of `buffer` was searched.
    searched: usize,
    /// The address of `buffer`'s first byte.
    base: u64,
}

/// Is told of a pattern, where it begins, and what it is.
pub type Sink<'a> = &'a mut dyn FnMut(&Pattern, u64, &[u8]);

impl Search {
    /// A search for these patterns, whose anchors have at least three bytes.
    pub fn new(patterns: Vec<Pattern>) -> Search {
        let mut search = Search {
            patterns: Vec::new(),
            table: vec![0; 1 << 16],
            buckets: Vec::new(),
            buffer: Vec::new(),
            searched: 0,
            base: 0,
        };
        for (index, pattern) in patterns.iter().enumerate() {
            for anchor in &pattern.anchors {
                search.add(index, anchor, pattern.any_case);
            }
        }
        search.patterns = patterns;
        search
    }

    fn add(&mut self, pattern: usize, anchor: &[u8], any_case: bool) {
        for (offset, pair) in anchor.windows(2).take(2).enumerate() {
            let cases = |byte: u8| match any_case {
                true => vec![byte.to_ascii_lowercase(), byte.to_ascii_uppercase()],
                false => vec![byte],
            };
            let mut pairs: Vec<_> =
                cases(pair[0]).into_iter().flat_map(|a| cases(pair[1]).into_iter().map(move |b| [a, b])).collect();
            pairs.dedup();
            pairs.sort_unstable();
            pairs.dedup();
            for pair in pairs {
                let entry = &mut self.table[usize::from(u16::from_le_bytes(pair))];
                if *entry == 0 {
                    self.buckets.push(Vec::new());
                    *entry = self.buckets.len() as u16;
                }
                let candidate = Candidate { pattern, anchor: anchor.to_vec(), any_case, offset };
                self.buckets[usize::from(*entry) - 1].push(candidate);
            }
        }
    }

    /// Searches the next piece, which may or may not follow the one before.
    pub fn feed(&mut self, at: u64, bytes: &[u8], sink: Sink<'_>) {
        if at != self.base.wrapping_add(self.buffer.len() as u64) {
            self.end(sink);
            self.base = at;
        }
        self.buffer.extend_from_slice(bytes);
        self.search(self.buffer.len().saturating_sub(AHEAD), sink);
        // One byte is kept, to tell whether a word begins behind it.
        let done = self.searched.saturating_sub(1);
        self.buffer.drain(..done);
        self.base = self.base.wrapping_add(done as u64);
        self.searched -= done;
    }

    /// Searches what is left: nothing follows.
    pub fn end(&mut self, sink: Sink<'_>) {
        self.search(self.buffer.len(), sink);
        self.buffer.clear();
        self.searched = 0;
        // No piece follows this by its address.
        self.base = u64::MAX;
    }

    /// Looks for anchors that begin before `end`.
    fn search(&mut self, end: usize, sink: Sink<'_>) {
        let (buffer, start) = (&self.buffer[..], self.searched);
        let mut at = start;
        while at <= end && at + 1 < buffer.len() {
            let entry = self.table[usize::from(u16::from_le_bytes([buffer[at], buffer[at + 1]]))];
            if entry != 0 {
                for candidate in &self.buckets[usize::from(entry) - 1] {
                    let Some(begin) = at.checked_sub(candidate.offset) else { continue };
                    if (start..end).contains(&begin) && candidate.is_at(&buffer[begin..]) {
                        let pattern = &self.patterns[candidate.pattern];
                        let before = begin.checked_sub(1).map(|before| buffer[before]);
                        let window = &buffer[begin..buffer.len().min(begin + AHEAD)];
                        if let Some(length) = (pattern.check)(window, before, candidate.anchor.len()) {
                            sink(pattern, self.base.wrapping_add(begin as u64), &window[..length.min(window.len())]);
                        }
                    }
                }
            }
            at += 2;
        }
        self.searched = self.searched.max(end);
    }
}

impl Candidate {
    fn is_at(&self, text: &[u8]) -> bool {
        text.get(..self.anchor.len()).is_some_and(|there| match self.any_case {
            true => there.eq_ignore_ascii_case(&self.anchor),
            false => there == self.anchor,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::patterns;
    use super::*;

    fn found(pieces: &[(u64, &[u8])], wanted: &str) -> Vec<u64> {
        let mut search = Search::new(patterns::all(&[wanted.into()]));
        let mut places = Vec::new();
        let mut sink = |pattern: &Pattern, at, _: &[u8]| {
            if pattern.kind == "wanted" {
                places.push(at);
            }
        };
        pieces.iter().for_each(|(at, bytes)| search.feed(*at, bytes, &mut sink));
        search.end(&mut sink);
        // Neighbours may be met the other way round.
        places.sort_unstable();
        places
    }

    #[test]
    fn every_place_is_found_once_however_the_stream_is_cut() {
        let mut text = vec![b'.'; 5000];
        let places = [0usize, 7, 1000, 1020, 1024, 2047, 3001, 4996];
        places.iter().for_each(|at| text[*at..at + 4].copy_from_slice(b"miau"));
        let expected: Vec<u64> = places.iter().map(|at| *at as u64).collect();
        for size in [1, 2, 3, 100, 1024, 1025, 4999, 5000] {
            let pieces: Vec<_> = text.chunks(size).enumerate().map(|(n, piece)| ((n * size) as u64, piece)).collect();
            assert_eq!(found(&pieces, "miau"), expected, "{size}");
        }
        // What does not follow does not continue.
        assert_eq!(found(&[(0, b"mi"), (100, b"au")], "miau"), [0; 0]);
        assert_eq!(found(&[(0, b"mi"), (2, b"au"), (4, b"miau")], "miau"), [0, 4]);
        assert_eq!(found(&[(0, b"aaaaaa")], "aaaa"), [0, 1, 2]);
    }
}
