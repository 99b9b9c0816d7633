// SPDX-License-Identifier: MIT OR Apache-2.0
//! A process beside the chains, for what takes one: chains run without it.
//!
//! An agent is a loop over duties. Each runs when its time has come, or when what it watches has
//! something to tell:
//!
//! | Duty | Does |
//! |---|---|
//! | [`attach`] | attaches chains to devices that come, told of them by [`devices`] |
//! | [`events`] | reads what chains report, and gives it to everyone who follows |
//! | [`expire`] | removes elements of sets whose time is over |
//! | [`inject`] | wakes subflows that a chain waits for a packet of |
//!
//! A duty that fails says so on standard error and tries again later; the agent goes on. What it
//! does to chains it does under the same lock and in the same steps as `apply`, so it can be killed
//! at any time, and what runs goes on.

pub mod attach;
pub mod devices;
pub mod events;
pub mod expire;
pub mod inject;

use std::collections::HashMap;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, socket};

use crate::engine::store::{self, Store};
use crate::error::Refused;

/// Names of sockets begin so: one agent a folder and network namespace.
const SOCKET: &str = "policy-chain/agent/";
/// No wait is longer.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// One of the things an agent does.
pub trait Duty {
    /// What it watches: it also runs when this can be read, and must then read it.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Does what there is to do. It runs again after the time returned, at the latest.
    ///
    /// It does not wait for long: other duties wait for it. Its failures are its own to [`log`].
    fn run(&mut self) -> Duration;
}

/// The duties of an agent, in the order they run if several are due.
fn duties(folder: &Path) -> Vec<Box<dyn Duty>> {
    vec![
        Box::new(attach::Attaching::new(folder)),
        Box::new(inject::Injector::new(folder)),
        Box::new(expire::Expiry::new(folder)),
        Box::new(events::FanOut::new(folder)),
    ]
}

/// Runs an agent in the calling thread's network namespace until `stop` can be read.
///
/// # Errors
/// [`Refused`] if there is an agent already, or without permission.
pub fn run(folder: &Path, stop: impl AsFd) -> Result<()> {
    let folder = store::canonical(folder)?;
    let _claim = claim(&folder)?;
    Store::open(&folder)?.state()?;
    log(&format!("agent of {} is up", folder.display()));
    serve(&mut duties(&folder), stop.as_fd())
}

/// Runs duties until `stop` can be read. What has begun is finished first.
///
/// # Errors
/// What the kernel says of waiting.
pub fn serve(duties: &mut [Box<dyn Duty>], stop: BorrowedFd<'_>) -> Result<()> {
    let mut due = vec![Instant::now(); duties.len()];
    loop {
        let (stopped, readable) = wait(duties, &due, stop)?;
        if stopped {
            return Ok(());
        }
        for ((duty, due), readable) in duties.iter_mut().zip(&mut due).zip(readable) {
            if readable || *due <= Instant::now() {
                *due = Instant::now() + duty.run().min(WAIT_MAX);
            }
        }
    }
}

/// Waits until a duty is due or has something to read. Tells whether to stop, and which duties have
/// something to read.
fn wait(
    duties: &[Box<dyn Duty>],
    due: &[Instant],
    stop: BorrowedFd<'_>,
) -> Result<(bool, Vec<bool>)> {
    let watched = duties.iter().map(|duty| duty.descriptor());
    let mut polled = vec![PollFd::new(stop, PollFlags::POLLIN)];
    let positions: Vec<Option<usize>> = watched
        .map(|descriptor| {
            polled.push(PollFd::new(descriptor?, PollFlags::POLLIN));
            Some(polled.len() - 1)
        })
        .collect();
    let next = due.iter().min().copied();
    let left = next.map_or(WAIT_MAX, |next| {
        next.saturating_duration_since(Instant::now())
    });
    // The kernel's clock for this ticks in milliseconds, rounded down.
    let left = left + Duration::from_millis(u64::from(!left.is_zero()));
    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
    match poll(&mut polled, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno).context("wait for something to do"),
    }
    let is_ready = |at: usize| {
        polled[at]
            .revents()
            .is_some_and(|events| !events.is_empty())
    };
    let readable = positions.iter().map(|at| at.is_some_and(is_ready));
    Ok((is_ready(0), readable.collect()))
}

/// Has `SIGINT`, `SIGTERM` and `SIGHUP` make what is returned readable, in place of ending the
/// process. `SIGHUP` stays ignored where it is (`nohup`). To be called before other threads start.
///
/// # Errors
/// What the kernel says.
pub fn stop_signals() -> Result<SignalFd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    if !hangup_is_ignored() {
        signals.add(Signal::SIGHUP);
    }
    signals.thread_block().context("block signals")?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    SignalFd::with_flags(&signals, flags).context("wait for signals")
}

/// Has `SIGINT`, `SIGTERM` and `SIGHUP` call a function, on a thread of its own, in place of ending
/// the process. `SIGHUP` stays ignored where it is (`nohup`). Once a process.
///
/// # Errors
/// There is a handler already.
pub fn on_stop(handler: impl FnMut() + Send + 'static) -> Result<()> {
    let ignored = hangup_is_ignored();
    ctrlc::set_handler(handler).context("handle interrupts")?;
    if ignored {
        // SAFETY: what it replaces only wakes the handler's thread.
        unsafe { signal(Signal::SIGHUP, SigHandler::SigIgn) }.context("ignore hangups")?;
    }
    Ok(())
}

fn hangup_is_ignored() -> bool {
    // SAFETY: plain data, for which zeros are a value.
    let mut now: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: nothing is set; what is set already goes to a structure that outlives the call.
    let asked = unsafe { libc::sigaction(libc::SIGHUP, std::ptr::null(), &raw mut now) };
    asked == 0 && now.sa_sigaction == libc::SIG_IGN
}

/// Writes a line to standard error.
pub fn log(message: &str) {
    // There is nobody left to tell if this fails.
    drop(writeln!(std::io::stderr(), "{message}"));
}

/// Failures that were said, so that what goes on failing is said once.
#[derive(Default)]
pub struct Failures {
    /// With when it was last so.
    said: HashMap<String, Instant>,
}

impl Failures {
    /// What has not failed for so long is said again.
    const FORGOTTEN: Duration = Duration::from_secs(60);

    /// Says it on standard error, unless it has been said and was so since.
    pub fn say(&mut self, why: &str) {
        if self.is_new(why, Instant::now()) {
            log(why);
        }
    }

    #[cfg(test)]
    fn says(&self, part: &str) -> bool {
        self.said.keys().any(|why| why.contains(part))
    }

    fn is_new(&mut self, why: &str, now: Instant) -> bool {
        self.said
            .retain(|_, last| now.saturating_duration_since(*last) < Failures::FORGOTTEN);
        self.said.insert(why.to_owned(), now).is_none()
    }
}

/// Takes the right to be the agent of a folder in this network namespace, held until dropped: an
/// abstract socket, whose name goes with the process.
fn claim(folder: &Path) -> Result<OwnedFd> {
    let what = format!("cannot be the agent of {}", folder.display());
    let name = [SOCKET.as_bytes(), folder.as_os_str().as_bytes()].concat();
    let address = UnixAddr::new_abstract(&name).map_err(|errno| {
        Refused::state(
            &what,
            format!("its path is too long: {}", errno.desc()),
            "use a shorter --bpffs folder",
        )
    })?;
    let socket = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .context("make a socket")?;
    match bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &address) {
        Ok(()) => Ok(socket),
        Err(Errno::EADDRINUSE) => Err(Refused::state(
            what,
            "another one is there, in this network namespace",
            format!("leave it to that, or end it: `ss -xap | grep {SOCKET}` tells which it is"),
        )
        .into()),
        Err(errno) => Err(errno).context(what),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::cell::RefCell;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::rc::Rc;

    use super::*;

    /// Reads what it watches, notes each run, and stops the loop at last.
    struct Noting {
        watched: UnixStream,
        other: UnixStream,
        runs: Rc<RefCell<Vec<usize>>>,
        stop: UnixStream,
    }

    impl Duty for Noting {
        fn descriptor(&self) -> Option<BorrowedFd<'_>> {
            Some(self.watched.as_fd())
        }

        fn run(&mut self) -> Duration {
            let read = self.watched.read(&mut [0; 8]).unwrap_or(0);
            let mut runs = self.runs.borrow_mut();
            runs.push(read);
            match runs.len() {
                // Woken up by what can be read, long before its time.
                1 => {
                    self.other.write_all(b"abc").unwrap();
                    Duration::from_secs(3600)
                }
                // By the clock.
                2 => Duration::from_millis(2),
                _ => {
                    self.stop.write_all(b"x").unwrap();
                    Duration::from_secs(3600)
                }
            }
        }
    }

    #[test]
    fn duties_run_when_due_and_when_there_is_something_to_read() {
        let (watched, other) = UnixStream::pair().unwrap();
        watched.set_nonblocking(true).unwrap();
        let (stop, stopped) = UnixStream::pair().unwrap();
        let runs = Rc::default();
        let duty = Noting {
            watched,
            other,
            runs: Rc::clone(&runs),
            stop,
        };
        serve(&mut [Box::new(duty)], stopped.as_fd()).unwrap();
        assert_eq!(*runs.borrow(), [0, 3, 0]);
    }

    #[test]
    fn failures_are_said_once() {
        let mut failures = Failures::default();
        let begin = Instant::now();
        let mut news = |seconds: u64, why| {
            let now = begin + Duration::from_secs(seconds);
            failures.is_new(why, now)
        };
        assert!(news(0, "a"));
        assert!(!news(1, "a"));
        assert!(news(2, "b"));
        // By turns, and for long.
        for seconds in (30..300).step_by(30) {
            assert!(!news(seconds, "a"));
        }
        assert!(news(300, "b"));
        assert!(!news(310, "a"));
    }

    #[test]
    fn one_agent_a_folder() {
        let name = format!("/nonexistent/{}", std::process::id());
        let folder = store::canonical(Path::new(&name)).unwrap();
        let first = claim(&folder).unwrap();
        let error = claim(&folder).unwrap_err();
        assert!(error.downcast_ref::<Refused>().is_some(), "{error}");
        claim(&folder.join("other")).unwrap();
        drop(first);
        // A child that another test starts has the socket too, until it is another program.
        let limit = Instant::now() + Duration::from_secs(10);
        while claim(&folder).is_err() {
            assert!(Instant::now() < limit, "the name stays");
            std::thread::sleep(Duration::from_millis(5));
        }
        let long = Path::new("/").join("x".repeat(100));
        assert!(claim(&long).unwrap_err().to_string().contains("too long"));
    }
}
