//! Dates, for headers and for the guest book. In UTC: the guest knows no time zones.

const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// A moment on the calendar.
struct Moment {
    year: i64,
    /// 0 to 11.
    month: usize,
    day: i64,
    /// Days since Thursday, 1 January 1970.
    days: i64,
    /// Seconds since midnight.
    seconds: i64,
}

fn moment(unix: i64) -> Moment {
    let unix = unix.clamp(0, 253_402_300_799); // Year 9999.
    let (days, seconds) = (unix / 86400, unix % 86400);
    let leap = |year: i64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let (mut year, mut left) = (1970, days);
    loop {
        let length = if leap(year) { 366 } else { 365 };
        if left < length {
            break;
        }
        left -= length;
        year += 1;
    }
    let february = if leap(year) { 29 } else { 28 };
    let mut month = 0;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if left < length {
            break;
        }
        left -= length;
        month += 1;
    }
    Moment { year, month, day: left + 1, days, seconds }
}

/// `Mon, 23 Nov 2026 10:28:15 GMT`, as HTTP writes it (RFC 9110, section 5.6.7).
pub(super) fn http(unix: i64) -> String {
    let Moment { year, month, day, days, seconds } = moment(unix);
    let (weekday, month) = (DAYS[days as usize % 7], MONTHS[month % 12]);
    format!("{weekday}, {day:02} {month} {year} {} GMT", clock(seconds))
}

/// `2026-11-23T10:28:15Z`, as RFC 3339 writes it.
pub(super) fn iso(unix: i64) -> String {
    let Moment { year, month, day, seconds, .. } = moment(unix);
    format!("{year}-{:02}-{day:02}T{}Z", month + 1, clock(seconds))
}

fn clock(seconds: i64) -> String {
    format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right_around_leap_days_and_at_the_ends() {
        for (unix, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_795_429_695, "2026-11-23T10:28:15Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (i64::MAX, "9999-12-31T23:59:59Z"),
            (i64::MIN, "1970-01-01T00:00:00Z"),
        ] {
            assert_eq!(iso(unix), text);
        }
        assert_eq!(http(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT");
    }
}
