//! Credit: how much one side may send before the other has taken it (virtio 1.2 section 5.10.6.3).
//!
//! Each side tells the size of its receive buffer (`buf_alloc`) and how many bytes it has taken out of it
//! since the beginning (`fwd_cnt`, modulo 2³²). All numbers from the guest are hostile; the worst that they
//! can do is to stop the guest's own connection.

/// The accounts of one connection, both ways.
#[derive(Debug, Default)]
pub struct Credit {
    /// The size of our buffer, as the guest is told.
    buf_alloc: u32,
    /// Bytes from the guest that went on to the stream (or were dropped for good).
    forwarded: u32,
    /// `forwarded` as the guest last heard it.
    announced: u32,
    /// Bytes that we sent to the guest.
    sent: u32,
    /// What the guest last said of its own buffer.
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
}

impl Credit {
    pub fn new(buf_alloc: u32) -> Credit {
        Credit { buf_alloc, ..Credit::default() }
    }

    /// The guest told where it stands, as every packet does.
    pub fn hear(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.guest_buf_alloc = buf_alloc;
        self.guest_fwd_cnt = fwd_cnt;
    }

    /// We tell where we stand: `buf_alloc` and `fwd_cnt` of a packet that goes out now.
    pub fn announce(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        (self.buf_alloc, self.forwarded)
    }

    /// How many bytes the guest can take now.
    pub fn available(&self) -> usize {
        let in_flight = self.sent.wrapping_sub(self.guest_fwd_cnt);
        self.guest_buf_alloc.saturating_sub(in_flight) as usize
    }

    /// `count` bytes, at most what was available, went to the guest.
    pub fn spend(&mut self, count: usize) {
        self.sent = self.sent.wrapping_add(count as u32);
    }

    /// Whether `count` more bytes fit in our buffer, of which `held` are in use.
    pub fn allows(&self, held: usize, count: usize) -> bool {
        held.checked_add(count).is_some_and(|total| total <= self.buf_alloc as usize)
    }

    /// `count` bytes from the guest need our buffer no more.
    pub fn forward(&mut self, count: usize) {
        self.forwarded = self.forwarded.wrapping_add(count as u32);
    }

    /// Whether the guest should hear of our progress: half of the buffer is free without its knowing. Told
    /// later, it might wait for us; told at every step, it would be woken for little.
    pub fn is_stale(&self) -> bool {
        self.forwarded.wrapping_sub(self.announced) >= self.buf_alloc / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_and_not_yet_taken_uses_credit_also_across_the_wrap() {
        let mut credit = Credit { sent: u32::MAX - 9, guest_fwd_cnt: u32::MAX - 9, ..Credit::new(64) };
        credit.hear(100, u32::MAX - 9);
        assert_eq!(credit.available(), 100);
        credit.spend(60);
        assert_eq!(credit.available(), 40);
        credit.hear(100, 50);
        assert_eq!(credit.available(), 100);
        credit.spend(100);
        credit.hear(30, 50);
        assert_eq!(credit.available(), 0, "the guest shrank its buffer below what is in flight");
    }

    #[test]
    fn a_guest_that_claims_to_have_taken_more_than_was_sent_gets_nothing() {
        let mut credit = Credit::new(64);
        credit.hear(u32::MAX - 1, 1);
        assert_eq!(credit.available(), 0);
    }

    #[test]
    fn the_guest_is_told_when_half_of_the_buffer_is_free() {
        let mut credit = Credit::new(64);
        assert!(credit.allows(60, 4) && !credit.allows(60, 5) && !credit.allows(60, usize::MAX));
        credit.forward(31);
        assert!(!credit.is_stale());
        credit.forward(1);
        assert!(credit.is_stale());
        assert_eq!(credit.announce(), (64, 32));
        assert!(!credit.is_stale());
    }
}
