//! The PC's real-time clock (Motorola MC146818A data sheet): an index port, a data port, and the time.
//!
//! The time is the host's, in UTC, whenever it is asked for; a guest that sets it changes nothing. So the
//! clock is right after every wake. Alarms and periodic interrupts are not wired.

use std::time::{SystemTime, UNIX_EPOCH};

use acpi_tables::aml;
use serde::{Deserialize, Serialize};

use super::BusDevice;
use crate::acpi;

/// The ports 0x70 and 0x71.
pub const PORTS: u16 = 2;

const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;
/// By convention of the PC the century lives here (and in the FADT's CENTURY field, which we leave 0).
const CENTURY: u8 = 0x32;

/// Register A: 32.768 kHz time base, 1024 Hz rate; the update-in-progress bit is never seen set.
const A_DEFAULT: u8 = 0x26;
/// Register B: 24-hour mode, binary-coded decimal.
const B_DEFAULT: u8 = 1 << 1;
const B_BINARY: u8 = 1 << 2;
/// Register D: the battery is good.
const D_VALID: u8 = 1 << 7;

/// The guest-visible registers. The time itself is not among them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    /// The register that the data port leads to.
    pub index: u8,
    /// Register A.
    pub a: u8,
    /// Register B.
    pub b: u8,
}

impl Default for RtcState {
    fn default() -> RtcState {
        RtcState { index: 0, a: A_DEFAULT, b: B_DEFAULT }
    }
}

/// The clock.
pub struct Rtc {
    state: RtcState,
}

impl Rtc {
    /// Any state is a good one.
    pub fn new(state: RtcState) -> Rtc {
        Rtc { state }
    }

    /// The state to save.
    pub fn state(&self) -> RtcState {
        self.state.clone()
    }

    fn register(&self, now: SystemTime) -> u8 {
        let time = Calendar::of(now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()));
        let value = match self.state.index {
            0x00 => time.second,
            0x02 => time.minute,
            0x04 => time.hour,
            0x06 => time.weekday,
            0x07 => time.day,
            0x08 => time.month,
            0x09 => (time.year % 100) as u8,
            CENTURY => (time.year / 100) as u8,
            REGISTER_A => return self.state.a,
            REGISTER_B => return self.state.b,
            REGISTER_C => return 0,
            REGISTER_D => return D_VALID,
            _ => return 0,
        };
        if self.state.b & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (1, [byte]) = (offset, data) {
            *byte = self.register(SystemTime::now());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, [index]) => self.state.index = index & 0x7f, // bit 7 masks NMI on a PC
            (1, [value]) if self.state.index == REGISTER_A => self.state.a = value & 0x7f,
            (1, [value]) if self.state.index == REGISTER_B => self.state.b = value | B_DEFAULT,
            _ => {}
        }
    }
}

/// Describes the clock (PNP0B00). No interrupt: a machine without legacy interrupts has none to spare for
/// alarms, and Linux then does without.
pub fn aml(base_port: u16) -> Vec<u8> {
    let hid = aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0B00"));
    let ports = aml::IO::new(base_port, base_port, 1, PORTS as u8);
    let resources = aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&ports]));
    acpi::bytes(&aml::Device::new("RTC_".into(), vec![&hid, &resources]))
}

/// A moment in the proleptic Gregorian calendar, UTC.
#[derive(Debug, PartialEq, Eq)]
struct Calendar {
    year: u64,
    month: u8,
    day: u8,
    /// 1 is Sunday.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Calendar {
    /// From seconds since 1970.
    fn of(seconds: u64) -> Calendar {
        let (days, in_day) = (seconds / 86400, seconds % 86400);
        // Count years from March, so that the leap day comes last, and eras of 400 years (146097 days)
        // from 1 March 0000, which is 719468 days before 1970.
        let since_march = days + 719_468;
        let (era, in_era) = (since_march / 146_097, since_march % 146_097);
        let year_of_era = (in_era - in_era / 1460 + in_era / 36_524 - in_era / 146_096) / 365;
        let day_of_year = in_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153; // months of 31,30,31,30,31 days repeat: 153
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        Calendar {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u8,
            weekday: ((days + 4) % 7 + 1) as u8, // 1 January 1970 was a Thursday
            hour: (in_day / 3600) as u8,
            minute: (in_day / 60 % 60) as u8,
            second: (in_day % 60) as u8,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_calendar_knows_leap_years() {
        let date = |seconds| {
            let c = Calendar::of(seconds);
            (c.year, c.month, c.day, c.weekday, c.hour, c.minute, c.second)
        };
        assert_eq!(date(0), (1970, 1, 1, 5, 0, 0, 0));
        assert_eq!(date(951_782_399), (2000, 2, 28, 2, 23, 59, 59));
        assert_eq!(date(951_782_400), (2000, 2, 29, 3, 0, 0, 0));
        assert_eq!(date(4_107_542_400), (2100, 3, 1, 2, 0, 0, 0));
        assert_eq!(date(1_795_430_591), (2026, 11, 23, 2, 10, 43, 11));
    }

    #[test]
    fn the_time_is_coded_as_register_b_says() {
        let mut rtc = Rtc::new(RtcState::default());
        let now = UNIX_EPOCH + Duration::from_secs(1_795_430_591);
        let mut at = |index: u8| {
            rtc.write(0, &[index]);
            rtc.register(now)
        };
        assert_eq!([at(9), at(8), at(7), at(4), at(2), at(0), at(CENTURY)], [0x26, 0x11, 0x23, 0x10, 0x43, 0x11, 0x20]);
        assert_eq!((at(REGISTER_D), at(0x7f)), (D_VALID, 0));
        rtc.write(0, &[REGISTER_B]);
        rtc.write(1, &[B_BINARY]);
        rtc.write(0, &[8]);
        assert_eq!(rtc.register(now), 11);
    }
}
