// SPDX-License-Identifier: MIT OR Apache-2.0
//! The consumer of the ring buffer that the chains of this network namespace report to.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use libbpf_rs::{MapHandle, RingBuffer, RingBufferBuilder};

use super::decode::Decoder;
use super::names::Current;
use super::time::Clock;
use super::{Event, Source};
use crate::engine::bpf::{report_of, types::report};
use crate::engine::store::Store;
use crate::engine::sys;
use crate::netns;
use crate::policy::btf;

/// What the ring buffer is called in the folder of a generation.
const PIN: &str = btf::EVENTS;
/// How often is looked whether it is still the same.
const CHECK: Duration = Duration::from_secs(1);
/// Reports taken at once.
const BATCH: usize = 1024;
/// Checks in a row that may fail: chains may be in the middle of a change.
const FAILURES: u32 = 10;

/// Where the chains of this network namespace report to; `None` if none of them reports.
///
/// # Errors
/// No permission, or a record that cannot be read.
pub fn find(folder: &Path) -> Result<Option<PathBuf>> {
    let here = netns::current_id()?;
    let attachments = Store::open(folder)?.attachments()?;
    let pins = attachments
        .iter()
        .filter(|attachment| attachment.netns == here)
        .map(|attachment| attachment.generation().join(PIN));
    Ok(pins.into_iter().find(|pin| pin.exists()))
}

/// Events out of the ring buffer, whichever that is at a time. Belongs to the network namespace of
/// the thread that polls it.
pub struct Ring {
    folder: PathBuf,
    open: Option<Open>,
    checked: Instant,
    failures: u32,
    decoder: Decoder,
    names: Current,
}

struct Open {
    pin: PathBuf,
    id: u32,
    buffer: RingBuffer<'static>,
    /// What the last poll took.
    taken: Arc<Mutex<Vec<report>>>,
    _map: MapHandle,
}

impl Ring {
    /// Opens the ring buffer, if there is one yet. What it holds already is read too.
    ///
    /// # Errors
    /// No permission.
    pub fn open(folder: &Path) -> Result<Ring> {
        let mut ring = Ring {
            folder: folder.to_owned(),
            open: None,
            checked: Instant::now(),
            failures: 0,
            decoder: Decoder::new(Clock::new()?),
            names: Current::new(folder),
        };
        ring.check()?;
        Ok(ring)
    }

    /// Opens the ring buffer again if there is another one.
    fn check(&mut self) -> Result<()> {
        self.names.forget();
        // As long as the pin is there, all chains here report to what it holds.
        if self.open.as_ref().is_some_and(Open::is_current) {
            return Ok(());
        }
        let Some(pin) = find(&self.folder)? else {
            // What it holds already is worth reading.
            return Ok(());
        };
        match &mut self.open {
            Some(open) if map_id(&pin)? == open.id => open.pin = pin,
            open => *open = Some(Open::new(pin)?),
        }
        Ok(())
    }

    fn check_in_time(&mut self) -> Result<()> {
        if self.checked.elapsed() < CHECK {
            return Ok(());
        }
        self.checked = Instant::now();
        match self.check() {
            Ok(()) => self.failures = 0,
            Err(error) if self.failures >= FAILURES => return Err(error),
            Err(_) => self.failures += 1,
        }
        Ok(())
    }
}

impl Source for Ring {
    fn poll(&mut self, wait: Duration, sink: &mut dyn FnMut(u64, Event)) -> Result<()> {
        self.check_in_time()?;
        let Some(open) = &self.open else {
            thread::sleep(wait);
            return Ok(());
        };
        for report in open.take(wait)? {
            for event in self.decoder.decode(&report, &mut self.names) {
                sink(report.at, event);
            }
        }
        Ok(())
    }
}

impl Open {
    fn new(pin: PathBuf) -> Result<Open> {
        let what = || format!("open the ring buffer {}", pin.display());
        let map = MapHandle::from_pinned_path(&pin).with_context(what)?;
        let id = map_id(&pin)?;
        let taken = Arc::new(Mutex::new(Vec::new()));
        let mut builder = RingBufferBuilder::new();
        let reports = Arc::clone(&taken);
        let take = move |record: &[u8]| {
            let mut reports = reports.lock().unwrap_or_else(PoisonError::into_inner);
            reports.extend(report_of(record));
            // Of a number below 0, the ring buffer says that it was told to stop here.
            if reports.len() < BATCH { 0 } else { -STOP }
        };
        builder.add(&map, take).with_context(what)?;
        Ok(Open {
            buffer: builder.build().with_context(what)?,
            pin,
            id,
            taken,
            _map: map,
        })
    }

    fn is_current(&self) -> bool {
        map_id(&self.pin).is_ok_and(|id| id == self.id)
    }

    fn take(&self, wait: Duration) -> Result<Vec<report>> {
        let result = self.buffer.poll_raw(wait);
        if result < 0 && ![-STOP, -libc::EINTR].contains(&result) {
            let error = std::io::Error::from_raw_os_error(-result);
            return Err(error).context("read the ring buffer");
        }
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::take(&mut *taken))
    }
}

/// What ends a poll that has taken enough.
const STOP: i32 = libc::ECANCELED;

fn map_id(pin: &Path) -> Result<u32> {
    let what = || format!("open {}", pin.display());
    let map = sys::open_pin(pin).with_context(what)?;
    Ok(sys::map_info(&map).with_context(what)?.id)
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
