//! Work for its own sake: a load that can be counted.

/// How far to count when nobody says: some milliseconds of one CPU.
pub(super) const DEFAULT: u32 = 100_000;
/// The most that one request may ask for: below a second of one CPU.
pub(super) const MOST: u32 = 2_000_000;

/// Counts the primes below `n` by trial division: all arithmetic, no memory to speak of, and always the same.
pub(super) fn primes_below(n: u32) -> u32 {
    (2..n).filter(|candidate| is_prime(*candidate)).count() as u32
}

fn is_prime(n: u32) -> bool {
    if n.is_multiple_of(2) {
        return n == 2;
    }
    (3..).step_by(2).take_while(|divisor| divisor * divisor <= n).all(|divisor| !n.is_multiple_of(divisor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_primes_are_those_of_the_books() {
        assert_eq!([0, 2, 3, 10, 100].map(primes_below), [0, 0, 1, 4, 25]);
        assert_eq!(primes_below(DEFAULT), 9592);
    }
}
