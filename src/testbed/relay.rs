// SPDX-License-Identifier: MIT OR Apache-2.0
//! The relay: carries the frames of every path from one host to the other, unchanged, half of the
//! path's delay after they came.
//!
//! A thread a path and direction. The kernel says when a frame came, so what a thread is late in
//! seeing it costs nothing; what it is late in sending is what the delay is wrong by.
//!
//! Delays are kept in a file, [`FOLDER`]`/NAME.delays`, which relays look at all the time. A
//! relay that is a process of its own holds a lock on it.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use nix::unistd::{dup2_stderr, setsid};

use super::describe::{Port, Role};
use super::{MAX_PATHS, Testbed, check_delay, check_name};
use crate::error::{Invalid, Refused};
use crate::netns::{self, Namespace};
use crate::packet_socket::{self, bind, receive, set_option};

/// Where the delays of testbeds are kept.
const FOLDER: &str = "/run/policy-chain";
/// How often a relay looks whether delays changed, and whether the testbed is gone.
const LOOK: Duration = Duration::from_millis(20);
/// How long the end of a relay is waited for.
const END: Duration = Duration::from_secs(2);
/// Bytes of a delay in the file.
const WORD: usize = size_of::<u64>();
const MAX_FRAME: usize = 1 << 17;
/// Room in a socket for what comes while a thread does not run.
const SOCKET_BUFFER: libc::c_int = 32 << 20;
/// Frames received before those are sent that are due.
const BURST: usize = 64;
/// What a path holds at most, in each direction; what comes then is lost.
const MAX_HELD: usize = 256 << 20;

/// One way, in nanoseconds, by path.
type Delays = [AtomicU64; MAX_PATHS as usize];

/// A relay at work. Dropping it ends it, and what it holds is lost.
#[derive(Debug)]
pub struct Relay {
    /// Its end is the threads' sign to end.
    hangup: Option<UnixStream>,
    threads: Vec<JoinHandle<()>>,
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.hangup = None;
        for thread in self.threads.drain(..) {
            // A panic has told of itself.
            let _ = thread.join();
        }
    }
}

impl Testbed {
    /// Has threads of this process carry frames, if the testbed has a relay. Without a relay at
    /// work none arrives.
    ///
    /// # Errors
    /// [`Refused`] (state) if it has none, (denied) without permission.
    pub fn relay(&self) -> Result<Relay> {
        let namespace = self.namespace(Role::Relay)?;
        let file = open(self.name())?;
        let delays = Arc::new(Delays::default());
        look(&file, &delays)?;
        let (hangup, sign) = UnixStream::pair().context("make a pair of sockets")?;
        let sign = Arc::new(sign);
        let mut relay = Relay {
            hangup: Some(hangup),
            threads: Vec::new(),
        };
        for (path, number) in self.describe().paths.iter().zip(0..) {
            let Some(ports) = &path.relay else { continue };
            let [client, server] =
                [&ports.client, &ports.server].map(|port| namespace.enter(|| port_socket(port)));
            let [client, server] = [Arc::new(client??), Arc::new(server??)];
            for (from, to) in [(&client, &server), (&server, &client)] {
                let lane = Lane {
                    from: Arc::clone(from),
                    to: Arc::clone(to),
                    delays: Arc::clone(&delays),
                    path: number,
                    sign: Arc::clone(&sign),
                };
                relay.start(move || lane.run())?;
            }
        }
        relay.start(move || {
            while !waited(None, &sign, Some(LOOK)) {
                // It holds what it last knew.
                let _ = look(&file, &delays);
            }
        })?;
        Ok(relay)
    }

    /// Starts a relay that is a process of its own, `program testbed relay NAME`, and ends when
    /// the testbed's namespaces are removed.
    ///
    /// # Errors
    /// [`Refused`] (state) with what it said if it does not start.
    pub fn start_relay(&self, program: &Path) -> Result<()> {
        let what = || format!("cannot start the relay of testbed {}", self.name());
        let refusal = |why: &dyn std::fmt::Display| {
            Refused::state(what(), why, "see what it lacks, and make the testbed anew")
        };
        let mut command = Command::new(program);
        command
            .args(["testbed", "relay", self.name()])
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        // SAFETY: between fork and exec the closure makes one system call.
        unsafe { command.pre_exec(|| Ok(setsid().map(drop)?)) };
        let mut child = command.spawn().map_err(|error| refusal(&error))?;
        let mut said = String::new();
        if let Some(mut stderr) = child.stderr.take() {
            // It ends when the relay is at work, or has ended.
            stderr.read_to_string(&mut said).with_context(what)?;
        }
        match child.try_wait().with_context(what)? {
            None if said.is_empty() => Ok(()),
            _ => {
                child.wait().with_context(what)?;
                Err(refusal(&said.trim()).into())
            }
        }
    }

    /// Changes the round trip time added to a path. It holds a moment later, also for what is on
    /// its way.
    ///
    /// # Errors
    /// [`Invalid`] for a path that is not there or a delay out of bounds. [`Refused`] (state) if
    /// the testbed has no relay.
    pub fn set_delay(&self, path: u8, delay: Duration) -> Result<()> {
        self.namespace(Role::Relay)?;
        if self.path(path).is_none() {
            let expected = format!("1 to {}", self.describe().paths.len());
            return Err(Invalid::new("--path", path, expected).into());
        }
        check_delay(delay)?;
        let position = WORD * usize::from(path - 1);
        open(self.name())?
            .write_all_at(&word(delay), position as u64)
            .with_context(|| format!("write {}", file(self.name()).display()))
    }
}

/// Is the relay of the testbed `name`, until its namespaces are removed. Closes standard error
/// when it is at work.
///
/// # Errors
/// [`Refused`] (state) if there is no such testbed, or it has no relay, or has one at work.
pub fn run_relay(name: &str) -> Result<()> {
    let testbed = Testbed::open(name)?;
    let namespace = testbed.namespace(Role::Relay)?;
    let _lock =
        Flock::lock(open(name)?, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
            let what = format!("cannot be the relay of testbed {name}");
            match errno {
                Errno::EWOULDBLOCK => Refused::state(what, "it has one at work", ""),
                _ => Refused::state(what, errno.desc(), ""),
            }
        })?;
    let _relay = testbed.relay()?;
    let nothing = File::options().write(true).open("/dev/null");
    dup2_stderr(nothing.context("open /dev/null")?).context("close standard error")?;
    while is_named(namespace) {
        thread::sleep(LOOK);
    }
    Ok(())
}

/// Whether the namespace still has its name.
fn is_named(namespace: &Namespace) -> bool {
    let path = Path::new(netns::FOLDER).join(namespace.name());
    fs::metadata(path).is_ok_and(|it| it.ino() == namespace.id())
}

/// Stores the delays of a new testbed, one a path.
pub(super) fn keep(name: &str, delays: impl Iterator<Item = Duration>) -> Result<()> {
    let path = file(name);
    let keep = || -> io::Result<()> {
        fs::create_dir_all(FOLDER)?;
        // What a killed relay of that name still reads stays as it is.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::write(&path, delays.flat_map(word).collect::<Vec<u8>>())
    };
    keep().with_context(|| format!("write {}", path.display()))
}

/// Waits until a relay has ended whose testbed's namespaces were removed, and removes its file.
pub(super) fn end(name: &str) -> Result<()> {
    let Ok(mut locked) = File::open(file(name)) else {
        return Ok(());
    };
    let limit = Instant::now() + END;
    while let Err((file, _)) = Flock::lock(locked, FlockArg::LockExclusiveNonblock) {
        if Instant::now() > limit {
            let what = format!("the relay of testbed {name} does not end");
            let why = format!(
                "it still holds {} after {END:?}",
                self::file(name).display()
            );
            let advice = format!("end the process: policy-chain testbed relay {name}");
            return Err(Refused::state(what, why, advice).into());
        }
        locked = file;
        thread::sleep(Duration::from_millis(2));
    }
    forget(name);
    Ok(())
}

/// Removes the file of a testbed that is gone.
pub(super) fn forget(name: &str) {
    // What stays is replaced by the next testbed of that name.
    let _ = fs::remove_file(file(name));
}

fn file(name: &str) -> PathBuf {
    Path::new(FOLDER).join(format!("{name}.delays"))
}

fn open(name: &str) -> Result<File> {
    check_name(name)?;
    let path = file(name);
    let opened = File::options().read(true).write(true).open(&path);
    opened.map_err(|error| {
        let what = format!("cannot open {}", path.display());
        let advice = format!(
            "run as root; if it is gone: policy-chain testbed down {name}, and make it anew"
        );
        Refused::state(what, error, advice).into()
    })
}

/// A round trip time as it stands in the file.
fn word(delay: Duration) -> [u8; WORD] {
    let nanoseconds = u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX);
    nanoseconds.to_ne_bytes()
}

/// Takes over what the file says.
fn look(file: &File, delays: &Delays) -> Result<()> {
    let mut bytes = [0; WORD * MAX_PATHS as usize];
    let length = file.read_at(&mut bytes, 0).context("read delays")?;
    for (word, delay) in bytes[..length].chunks_exact(WORD).zip(delays) {
        let nanoseconds = word.try_into().map_or(0, u64::from_ne_bytes);
        delay.store(nanoseconds / 2, Ordering::Relaxed);
    }
    Ok(())
}

/// A socket for all that a port receives, and for what it is to send.
fn port_socket(port: &Port) -> Result<OwnedFd> {
    let socket = packet_socket::open()?;
    for name in [
        libc::PACKET_AUXDATA,
        libc::PACKET_IGNORE_OUTGOING,
        libc::PACKET_QDISC_BYPASS,
    ] {
        set_option(&socket, libc::SOL_PACKET, name, 1)?;
    }
    for name in [libc::SO_RCVBUFFORCE, libc::SO_SNDBUFFORCE] {
        set_option(&socket, libc::SOL_SOCKET, name, SOCKET_BUFFER)?;
    }
    set_option(&socket, libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 1)?;
    bind(&socket, port.ifindex, libc::ETH_P_ALL as u16)?;
    Ok(socket)
}

impl Relay {
    fn start(&mut self, work: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = thread::Builder::new().name("relay".to_owned()).spawn(work);
        self.threads.push(thread.context("start a thread")?);
        Ok(())
    }
}

/// One direction of a path.
struct Lane {
    from: Arc<OwnedFd>,
    to: Arc<OwnedFd>,
    delays: Arc<Delays>,
    path: usize,
    sign: Arc<UnixStream>,
}

impl Lane {
    fn run(&self) {
        be_punctual();
        let mut buffer = vec![0; MAX_FRAME];
        let mut held: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
        let mut bytes = 0;
        loop {
            let mut more = true;
            for _ in 0..BURST {
                // Errors are states of the device, which pass.
                let Ok(Some(frame)) = receive(&self.from, &mut buffer) else {
                    more = false;
                    break;
                };
                if bytes + frame.bytes.len() <= MAX_HELD {
                    bytes += frame.bytes.len();
                    held.push_back((arrival(frame.stamp), frame.bytes));
                }
            }
            let delay = Duration::from_nanos(self.delays[self.path].load(Ordering::Relaxed));
            let mut wait = None;
            while let Some((came, frame)) = held.front() {
                let left = (*came + delay).saturating_duration_since(Instant::now());
                if !left.is_zero() {
                    wait = Some(left.min(LOOK));
                    break;
                }
                self.send(frame);
                bytes -= frame.len();
                held.pop_front();
            }
            // While it holds a frame, whatever comes is due later than that.
            let watched = held.is_empty().then_some(&*self.from);
            if waited(
                watched,
                &self.sign,
                if more { Some(Duration::ZERO) } else { wait },
            ) {
                return;
            }
        }
    }

    /// What cannot be sent is lost, as on a wire.
    fn send(&self, frame: &[u8]) {
        // SAFETY: a buffer and its length.
        unsafe {
            libc::send(
                self.to.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                libc::MSG_DONTWAIT,
            )
        };
    }
}

/// Has the calling thread run as soon as a timer says so. Other threads wait for it, as they do for
/// no wire: where that is not permitted, delays are longer on a busy machine.
fn be_punctual() {
    let priority = libc::sched_param { sched_priority: 1 };
    // SAFETY: an option that takes one number; and a structure that outlives the call.
    unsafe {
        // Timers of other threads may be 50 microseconds late.
        libc::prctl(libc::PR_SET_TIMERSLACK, 1 as libc::c_ulong);
        libc::sched_setscheduler(0, libc::SCHED_RR, &raw const priority);
    }
}

/// When a frame came that has just been received.
fn arrival(stamp: Option<Duration>) -> Instant {
    let now = Instant::now();
    // The clock of the day may have been set since.
    let age = SystemTime::now()
        .duration_since(UNIX_EPOCH + stamp.unwrap_or_default())
        .unwrap_or_default();
    if age > LOOK {
        return now;
    }
    now - age
}

/// Waits for a frame, if a socket is given, for the time to pass, or for the sign to end: whether
/// it was that.
fn waited(socket: Option<&OwnedFd>, sign: &UnixStream, time: Option<Duration>) -> bool {
    let mut ends = vec![PollFd::new(sign.as_fd(), PollFlags::POLLIN)];
    ends.extend(socket.map(|it| PollFd::new(it.as_fd(), PollFlags::POLLIN)));
    // The only failure there is, a signal, is another reason to go on.
    let _ = ppoll(&mut ends, time.map(TimeSpec::from), None);
    ends[0].any().unwrap_or(false)
}
