// SPDX-License-Identifier: MIT OR Apache-2.0
//! Times as text (RFC 3339), and from the clock that reports are stamped by.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

use crate::engine::sys;

const SECOND: u64 = 1_000_000_000;
const DAY: u64 = 86_400;

/// Nanoseconds since the beginning of 1970, UTC. Text: RFC 3339, with nine digits of the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub u64);

impl Time {
    /// Hours, minutes, seconds, and nanoseconds of the second.
    fn of_day(self) -> (u64, u64, u64, u64) {
        let second = self.0 / SECOND % DAY;
        let (hour, minute) = (second / 3600, second / 60 % 60);
        (hour, minute, second % 60, self.0 % SECOND)
    }

    /// `12:34:56.789`
    pub fn clock_time(self) -> String {
        let (hour, minute, second, nanosecond) = self.of_day();
        let millisecond = nanosecond / 1_000_000;
        format!("{hour:02}:{minute:02}:{second:02}.{millisecond:03}")
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = date(self.0 / SECOND / DAY);
        let (hour, minute, second, nanosecond) = self.of_day();
        write!(f, "{year:04}-{month:02}-{day:02}")?;
        write!(f, "T{hour:02}:{minute:02}:{second:02}.{nanosecond:09}Z")
    }
}

impl FromStr for Time {
    type Err = anyhow::Error;

    /// Reads what [`Time`] prints.
    fn from_str(text: &str) -> Result<Time> {
        parse(text).with_context(|| format!("not a time as of RFC 3339: {text:?}"))
    }
}

fn parse(text: &str) -> Option<Time> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let mut date = date.splitn(3, '-').map(|part| part.parse::<u64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let (time, fraction) = time.split_once('.')?;
    let mut time = time.splitn(3, ':').map(|part| part.parse::<u64>().ok());
    let (hour, minute, second) = (time.next()??, time.next()??, time.next()??);
    let in_range = (1970..2500).contains(&year)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second < 60
        && fraction.len() == 9;
    let seconds = days(year, month, day) * DAY + hour * 3600 + minute * 60 + second;
    let nanoseconds = seconds.checked_mul(SECOND)?;
    let fraction: u64 = fraction.parse().ok()?;
    in_range.then_some(Time(nanoseconds + fraction))
}

/// Year, month and day of a day since the beginning of 1970. Years are counted from March here, so
/// that the day that comes every four years is a year's last.
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // from 1 March of the year 0
    let (era, day) = (days / 146_097, days % 146_097); // 400 years
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153; // from March
    let day = day - (153 * month + 2) / 5 + 1;
    let late = u64::from(month >= 10);
    (era * 400 + year + late, month + 3 - 12 * late, day)
}

/// The inverse of [`date`], for dates from 1970 on; what is none gives some number.
fn days(year: u64, month: u64, day: u64) -> u64 {
    let late = u64::from(month <= 2);
    let year = year.saturating_sub(late);
    let month = (month + 12 * late).saturating_sub(3);
    let (era, year) = (year / 400, year % 400);
    let days = era * 146_097 + year * 365 + year / 4 - year / 100 + (153 * month + 2) / 5 + day;
    days.saturating_sub(719_469)
}

/// What turns times of CLOCK_MONOTONIC into times of day.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    offset: u64,
}

impl Clock {
    /// Compares the clocks, once: that the time of day is set later does not show.
    ///
    /// # Errors
    /// No such clocks.
    pub fn new() -> Result<Clock> {
        let before = monotonic()?;
        let real = real()?;
        let after = monotonic()?;
        Ok(Clock {
            offset: real.saturating_sub(before + (after - before) / 2),
        })
    }

    /// The time of day at so many nanoseconds of CLOCK_MONOTONIC.
    pub fn time(&self, monotonic: u64) -> Time {
        Time(self.offset.saturating_add(monotonic))
    }
}

/// Now, in nanoseconds of CLOCK_MONOTONIC.
///
/// # Errors
/// No such clock.
pub fn monotonic() -> Result<u64> {
    nanoseconds(sys::monotonic().context("read the clock")?)
}

fn real() -> Result<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    nanoseconds(now.unwrap_or_default())
}

fn nanoseconds(time: Duration) -> Result<u64> {
    u64::try_from(time.as_nanos()).context("a time too late")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn times_as_text() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00"),
            (951_782_399, "2000-02-28T23:59:59"),
            (951_782_400, "2000-02-29T00:00:00"),
            (1_709_164_800, "2024-02-29T00:00:00"),
            (1_735_689_599, "2024-12-31T23:59:59"),
            (1_735_689_600, "2025-01-01T00:00:00"),
            (4_107_542_400, "2100-03-01T00:00:00"),
        ] {
            let time = Time(seconds * SECOND + 1_002_003);
            let text = format!("{text}.001002003Z");
            assert_eq!(time.to_string(), text);
            assert_eq!(text.parse::<Time>().unwrap(), time);
        }
    }

    #[test]
    fn every_day_there_and_back() {
        for day in 0..200_000 {
            let (year, month, of_month) = date(day);
            assert_eq!(days(year, month, of_month), day);
        }
    }

    #[test]
    fn what_is_no_time() {
        for text in [
            "",
            "Z",
            "1970-01-01",
            "1970-01-01T00:00:00Z",
            "1970-01-01T00:00:00.1Z",
            "1970-13-01T00:00:00.000000000Z",
            "1969-01-01T00:00:00.000000000Z",
            "1970-01-01T24:00:00.000000000Z",
            "0-0-0T0:0:0.000000000Z",
        ] {
            assert!(text.parse::<Time>().is_err(), "{text}");
        }
    }

    #[test]
    fn monotonic_to_real() {
        let clock = Clock::new().unwrap();
        let now = clock.time(monotonic().unwrap());
        let real = Time(super::real().unwrap());
        assert!(now.0.abs_diff(real.0) < SECOND, "{now} {real}");
    }
}
