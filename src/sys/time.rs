//! The calendar.

/// A moment, in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Moment {
    year: i64,
    month: i32,
    day: i32,
    hour: i32,
    minute: i32,
    second: i32,
}

impl Moment {
    /// So many seconds after 1970 began. None for what no calendar has.
    fn at(seconds: u64) -> Option<Moment> {
        let seconds = libc::time_t::try_from(seconds).ok()?;
        // SAFETY: `tm` is plain numbers and a pointer that nobody follows; zeros are a valid value of it.
        let mut time: libc::tm = unsafe { std::mem::zeroed() };
        // SAFETY: both pointers are to live values; gmtime_r writes only to the second.
        let failed = unsafe { libc::gmtime_r(&seconds, &mut time) }.is_null();
        (!failed).then(|| Moment {
            year: i64::from(time.tm_year) + 1900,
            month: time.tm_mon + 1,
            day: time.tm_mday,
            hour: time.tm_hour,
            minute: time.tm_min,
            second: time.tm_sec,
        })
    }
}

/// A moment as a tag: `2026-11-24-205730`.
pub fn tag(seconds: u64) -> Option<String> {
    let Moment { year, month, day, hour, minute, second } = Moment::at(seconds)?;
    Some(format!("{year:04}-{month:02}-{day:02}-{hour:02}{minute:02}{second:02}"))
}

/// A moment as other programs write it (RFC 3339): `2026-11-24T20:57:30Z`.
pub fn rfc3339(seconds: u64) -> Option<String> {
    let Moment { year, month, day, hour, minute, second } = Moment::at(seconds)?;
    (year <= 9999).then(|| format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_as_the_calendar_has_them() {
        assert_eq!(tag(1_700_000_000).unwrap(), "2023-11-14-221320");
        assert_eq!(rfc3339(1_700_000_000).unwrap(), "2023-11-14T22:13:20Z");
        assert_eq!(rfc3339(951_782_400).unwrap(), "2000-02-29T00:00:00Z");
        assert_eq!((rfc3339(1 << 40), tag(u64::MAX), rfc3339(i64::MAX as u64)), (None, None, None));
    }
}
