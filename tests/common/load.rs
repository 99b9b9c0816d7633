// SPDX-License-Identifier: MIT OR Apache-2.0
//! Background traffic, and rates measured on a machine that does other work too.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::mptcp::{Differs, MptcpConnection};

/// How often [`expect_rate`] measures.
const SAMPLES: usize = 5;

/// Sets a flag when dropped: who runs until it is set ends, though a test panics.
pub struct SetWhenDropped<'a>(pub &'a AtomicBool);

impl Drop for SetWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `check` while the client sends, `length` bytes every `pace`. Whether they are right is for
/// other tests to say.
pub fn while_sending<T>(
    connection: &MptcpConnection,
    length: usize,
    pace: Duration,
    check: impl FnOnce() -> T,
) -> T {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let begin = Instant::now();
            let mut rounds = 0;
            while !done.load(Ordering::Relaxed) {
                drop(connection.transfer(length));
                rounds += 1;
                let due = begin + rounds * pace;
                thread::sleep(due.saturating_duration_since(Instant::now()));
            }
        });
        let _done = SetWhenDropped(&done);
        check()
    })
}

/// Measures until a rate is in the range, and gives it. None may be above. Other work on this
/// machine makes some of them lower: that of [`SAMPLES`] is not all of them.
#[track_caller]
pub fn expect_rate(
    wanted: Range<f64>,
    mut measure: impl FnMut() -> Result<f64, Differs>,
) -> Result<f64, Differs> {
    let mut rates = Vec::new();
    while rates.len() < SAMPLES {
        let rate = measure()?;
        assert!(rate < wanted.end, "{rate} of {wanted:?} Mbit/s");
        if rate >= wanted.start {
            return Ok(rate);
        }
        rates.push(rate);
    }
    panic!("{rates:?} of {wanted:?} Mbit/s");
}
