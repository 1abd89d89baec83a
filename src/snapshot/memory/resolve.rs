//! A base and its differences, laid over each other.

use super::{Error, Index, Region};

/// The longest chain: one full snapshot and its differences.
pub const MAX_CHAIN: usize = 64;

/// Consecutive pages of the resulting memory, of one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The first guest-physical address.
    pub address: u64,
    /// In bytes.
    pub length: u64,
    /// Where its contents come from.
    pub source: Source,
}

/// Where the contents of a piece come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// They are zeros.
    Zeros,
    /// They are in the file `memory` of a snapshot of the chain.
    Layer {
        /// Which snapshot, counted from the base.
        layer: usize,
        /// Where they begin in its file.
        offset: u64,
    },
}

/// What memory is when the differences of `chain` are laid over its base, which comes first: pieces that
/// cover all of the regions, sorted, each inside one region and as long as can be.
pub fn resolve(chain: &[&Index]) -> Result<Vec<Piece>, Error> {
    let refuse = |why: &str| Err(Error::Chain(why.into()));
    let Some((base, differences)) = chain.split_first() else {
        return refuse("there is none");
    };
    if chain.len() > MAX_CHAIN {
        return refuse(&format!("{} of them lie over each other, more than {MAX_CHAIN}", chain.len()));
    }
    if !base.is_full() {
        return refuse("the first is a difference to one that is missing");
    }
    if differences.iter().any(|difference| difference.regions() != base.regions()) {
        return refuse("they are of machines with different RAM");
    }
    Ok(joined(flatten(chain, 0), base.regions()))
}

/// Halves are laid over each other like in a merge sort, so that no run is copied more than log₂(layers) times.
fn flatten(chain: &[&Index], first_layer: usize) -> Vec<Piece> {
    match chain {
        [] => Vec::new(),
        [index] => pieces(index, first_layer),
        _ => {
            let (lower, upper) = chain.split_at(chain.len() / 2);
            lay_over(&flatten(lower, first_layer), &flatten(upper, first_layer + lower.len()))
        }
    }
}

fn pieces(index: &Index, layer: usize) -> Vec<Piece> {
    let source = |offset: Option<u64>| offset.map_or(Source::Zeros, |offset| Source::Layer { layer, offset });
    let piece = |run: &super::Run| Piece { address: run.address, length: run.length, source: source(run.offset) };
    index.runs().iter().map(piece).collect()
}

/// All of `upper`, and of `lower` what it leaves open.
fn lay_over(lower: &[Piece], upper: &[Piece]) -> Vec<Piece> {
    let mut result = Vec::with_capacity(lower.len() + upper.len());
    let mut upper = upper.iter().peekable();
    for &piece in lower {
        let mut rest = Some(piece);
        while let Some(open) = rest {
            let Some(&&cover) = upper.peek().filter(|cover| cover.address < open.end()) else {
                result.push(open);
                break;
            };
            if cover.address > open.address {
                result.push(open.part(open.address, cover.address));
            }
            if cover.end() > open.end() {
                // It reaches into what comes next from below, and is still to be put down.
                rest = None;
            } else {
                result.push(cover);
                upper.next();
                rest = (cover.end() < open.end()).then(|| open.part(open.address.max(cover.end()), open.end()));
            }
        }
    }
    result.extend(upper);
    result
}

/// The same with neighbours of one source made one, but not across the border of two regions.
fn joined(mut pieces: Vec<Piece>, regions: &[Region]) -> Vec<Piece> {
    let starts_region = |address: u64| regions.binary_search_by_key(&address, |region| region.start).is_ok();
    pieces.dedup_by(|next, piece| {
        let follows = piece.end() == next.address && piece.source_at(next.address) == next.source;
        let same = follows && !starts_region(next.address);
        if same {
            piece.length += next.length;
        }
        same
    });
    pieces
}

impl Piece {
    fn end(&self) -> u64 {
        self.address + self.length
    }

    /// The source as it is from `address` on, if the piece began or ended there.
    fn source_at(&self, address: u64) -> Source {
        match self.source {
            Source::Zeros => Source::Zeros,
            Source::Layer { layer, offset } => Source::Layer { layer, offset: offset + (address - self.address) },
        }
    }

    /// The part from `start` to `end`, which lie inside.
    fn part(&self, start: u64, end: u64) -> Piece {
        Piece { address: start, length: end - start, source: self.source_at(start) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::random;
    use super::super::{PAGE, Run};
    use super::*;

    const PAGES: u64 = 300;
    const REGIONS: [Region; 3] = [
        Region { start: 0, length: 100 * PAGE },
        Region { start: 100 * PAGE, length: 50 * PAGE },
        Region { start: 1 << 32, length: 150 * PAGE },
    ];

    fn address(page: u64) -> u64 {
        if page < 150 { page * PAGE } else { (1 << 32) + (page - 150) * PAGE }
    }

    /// An index with random runs; `gaps` in a hundred of them are left out.
    fn index(seed: &mut u64, gaps: u64) -> Index {
        let (mut runs, mut page, mut offset) = (Vec::new(), 0, 0);
        while page < PAGES {
            let border = [100, 150, PAGES].into_iter().find(|border| *border > page).unwrap();
            let length = (1 + random(seed) % 20).min(border - page);
            if random(seed) % 100 >= gaps {
                let data = random(seed).is_multiple_of(2).then_some(offset);
                offset += data.map_or(0, |_| length * PAGE);
                runs.push(Run { address: address(page), length: length * PAGE, offset: data });
            }
            page += length;
        }
        Index::new(REGIONS.to_vec(), runs).unwrap()
    }

    /// Every page with its source, the slow way.
    fn page_by_page(chain: &[&Index]) -> Vec<Piece> {
        let mut pages = vec![None; PAGES as usize];
        for (layer, index) in chain.iter().enumerate() {
            for piece in pieces(index, layer) {
                for page in (0..PAGES).filter(|&page| (piece.address..piece.end()).contains(&address(page))) {
                    pages[page as usize] = Some(piece.part(address(page), address(page) + PAGE));
                }
            }
        }
        pages.into_iter().flatten().collect()
    }

    #[test]
    fn chains_resolve_as_if_done_page_by_page() {
        let mut seed = 7;
        for length in (1..12).cycle().take(300) {
            let layers: Vec<Index> = (0..length).map(|n| index(&mut seed, if n == 0 { 0 } else { 60 })).collect();
            let chain: Vec<&Index> = layers.iter().collect();
            let resolved = resolve(&chain).unwrap();
            let split = resolved.iter().flat_map(|piece| {
                (0..piece.length / PAGE).map(|n| piece.address + n * PAGE).map(|at| piece.part(at, at + PAGE))
            });
            assert_eq!(split.collect::<Vec<_>>(), page_by_page(&chain));
            assert_eq!(joined(resolved.clone(), &REGIONS), resolved, "nothing is left to be joined");
            assert!(resolved.iter().all(|p| REGIONS.iter().any(|r| r.start <= p.address && p.end() <= r.end())));
        }
    }

    #[test]
    fn chains_that_do_not_fit_are_refused() {
        let mut seed = 3;
        let (full, difference) = (index(&mut seed, 0), index(&mut seed, 60));
        let other = Index::new(vec![Region { start: 0, length: PAGE }], Vec::new()).unwrap();
        assert!(resolve(&[&full, &difference]).is_ok());
        assert!(resolve(&[&full; MAX_CHAIN]).is_ok());
        for chain in [&[][..], &[&difference], &[&difference, &full], &[&full, &other], &[&full; MAX_CHAIN + 1]] {
            assert!(matches!(resolve(chain), Err(Error::Chain(_))), "{}", chain.len());
        }
    }

    #[test]
    fn long_chains_of_scattered_pages_take_no_time() {
        let regions = vec![Region { start: 0, length: 16 << 30 }];
        let base = Index::new(regions.clone(), vec![Run { address: 0, length: 16 << 30, offset: Some(0) }]).unwrap();
        let scattered = |layer: u64| {
            let run = |n: u64| Run { address: (n * 80 + layer) * PAGE, length: PAGE, offset: Some(n * PAGE) };
            Index::new(regions.clone(), (0..50_000).map(run).collect()).unwrap()
        };
        let layers: Vec<Index> = std::iter::once(base).chain((0..MAX_CHAIN as u64 - 1).map(scattered)).collect();
        let started = std::time::Instant::now();
        let pieces = resolve(&layers.iter().collect::<Vec<_>>()).unwrap();
        assert_eq!(pieces.len(), 50_000 * MAX_CHAIN);
        // A quadratic way would take hours.
        assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
    }
}
