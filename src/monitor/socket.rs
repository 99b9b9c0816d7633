// SPDX-License-Identifier: MIT OR Apache-2.0
//! The socket that makes one process the consumer, and gives its events to all others: a line of
//! JSON each.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;

use super::event::Message;
use super::ring::Ring;
use super::{Event, Source, time};
use crate::error::Refused;

/// Lines that wait for one subscriber, at most; what comes then is lost to it.
const QUEUE: usize = 4096;
/// How long the consumer goes without looking at anything but events.
const TICK: Duration = Duration::from_millis(100);
/// Before the consumer begins, so that those whom another one served find it first: what is reported
/// meanwhile stays in the ring buffer.
const GATHER: Duration = Duration::from_millis(250);
const LULL: Duration = Duration::from_millis(10);
/// How often a subscriber to whom nothing is said is looked after.
const LOOK: Duration = Duration::from_secs(1);
/// How long subscribers may take to read what is left when the server stops.
const GRACE: Duration = Duration::from_secs(1);
/// Bytes to write at once, about.
const WRITE: usize = 32 << 10;

/// The name that belongs to a folder: abstract, so that of one network namespace.
///
/// # Errors
/// [`Refused`] if the folder's path is too long.
pub(super) fn name(folder: &Path) -> Result<SocketAddr> {
    let folder = canonical(folder)?;
    let name = [
        b"policy-chain/events".as_slice(),
        folder.as_os_str().as_bytes(),
    ]
    .concat();
    SocketAddr::from_abstract_name(name).map_err(|error| {
        let what = format!("no socket can be called after {}", folder.display());
        Refused::state(what, error, "choose a folder with a shorter path").into()
    })
}

/// The path without symbolic links, as far as it exists.
fn canonical(folder: &Path) -> Result<PathBuf> {
    let folder = std::path::absolute(folder).context("find the current folder")?;
    let there = folder.ancestors().find_map(|ancestor| {
        let rest = folder.strip_prefix(ancestor).ok()?;
        // Without a slash behind the folder itself.
        Some(
            ancestor
                .canonicalize()
                .ok()?
                .components()
                .chain(rest.components())
                .collect(),
        )
    });
    Ok(there.unwrap_or(folder))
}

/// Takes the name; `None` if another has it.
pub(super) fn bind(name: &SocketAddr) -> Result<Option<UnixListener>> {
    match UnixListener::bind_addr(name) {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(None),
        Err(error) => Err(error).context("bind the socket of events"),
    }
}

/// The user at the other end.
pub(super) fn peer(stream: &UnixStream) -> io::Result<u32> {
    Ok(getsockopt(stream, PeerCredentials)?.uid())
}

/// Whether a user may have what is ours.
pub(super) fn is_trusted(user: u32) -> bool {
    user == 0 || user == geteuid().as_raw()
}

/// The consumer: a thread that gives events to everyone who connects. Stops when dropped.
pub struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Server {
    /// Becomes the consumer of what is reported from now on in this network namespace.
    ///
    /// # Errors
    /// [`Refused`] (state) if there is one already; no permission.
    pub fn start(folder: &Path) -> Result<Server> {
        let Some(listener) = bind(&name(folder)?)? else {
            return Err(Refused::state(
                format!("the events of {} have a reader", folder.display()),
                "another process holds the socket of events",
                "subscribe to it, or end it: ss -xlp | grep policy-chain/events",
            )
            .into());
        };
        let ring = Ring::open(folder, time::monotonic()?)?;
        Server::serve(listener, Box::new(ring))
    }

    /// Serves another source's events.
    pub(super) fn serve(listener: UnixListener, source: Box<dyn Source>) -> Result<Server> {
        listener
            .set_nonblocking(true)
            .context("the socket of events")?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("events".to_owned())
            .spawn(move || serve(listener, source, &stopped))
            .context("start a thread")?;
        Ok(Server {
            stop,
            thread: Some(thread),
        })
    }

    /// Whether it still serves: it ends by itself when there can be no more events.
    pub fn is_running(&self) -> bool {
        self.thread
            .as_ref()
            .is_some_and(|thread| !thread.is_finished())
    }

    /// Lets the others read what is left, for a second, and go to whoever is next.
    ///
    /// # Errors
    /// Why it had ended, if it had.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        thread
            .join()
            .unwrap_or_else(|_| Err(anyhow!("the reader of events panicked")))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Who wants to know how it ended calls `stop`.
        drop(self.end());
    }
}

fn serve(listener: UnixListener, mut source: Box<dyn Source>, stop: &AtomicBool) -> Result<()> {
    let mut subscribers = Subscribers::default();
    let mut events: Vec<Event> = Vec::new();
    let mut result = Ok(());
    let begin = Instant::now();
    while begin.elapsed() < GATHER && !stop.load(Ordering::Relaxed) {
        subscribers.accept(&listener);
        thread::sleep(LULL);
    }
    while result.is_ok() && !stop.load(Ordering::Relaxed) {
        result = source.poll(TICK, &mut |event| events.push(event));
        // First: who connected before an event was read is to have it.
        subscribers.accept(&listener);
        for event in events.drain(..) {
            subscribers.send(Message::Event(event));
        }
        subscribers.tell_lost();
    }
    // From here on somebody else can be the consumer.
    drop(listener);
    subscribers.close();
    result
}

type Line = Arc<str>;

#[derive(Default)]
struct Subscribers(Vec<Subscriber>);

struct Subscriber {
    lines: SyncSender<Line>,
    /// Events not told, since it was last told so.
    lost: u64,
    stream: UnixStream,
    thread: JoinHandle<()>,
}

impl Subscribers {
    fn accept(&mut self, listener: &UnixListener) {
        // Of what fails here, the client sees that it is not connected any more.
        while let Ok((stream, _)) = listener.accept() {
            if peer(&stream).is_ok_and(is_trusted) {
                self.0.extend(Subscriber::new(stream));
            }
        }
    }

    fn send(&mut self, message: Message) {
        if self.0.is_empty() {
            return;
        }
        let line = line(&message);
        self.0.retain_mut(|subscriber| subscriber.send(&line));
    }

    fn tell_lost(&mut self) {
        self.0
            .retain_mut(|subscriber| subscriber.tell_lost() != Sent::Gone);
    }

    fn close(mut self) {
        self.tell_lost();
        let end = Instant::now() + GRACE;
        for Subscriber {
            lines,
            stream,
            thread,
            ..
        } in self.0
        {
            drop(lines);
            while !thread.is_finished() && Instant::now() < end {
                thread::sleep(Duration::from_millis(5));
            }
            // Ends a write that nobody reads. It may be gone already.
            drop(stream.shutdown(std::net::Shutdown::Both));
            drop(thread.join());
        }
    }
}

fn line(message: &Message) -> Line {
    format!("{}\n", message.to_json()).into()
}

#[derive(PartialEq)]
enum Sent {
    Done,
    Full,
    Gone,
}

impl Subscriber {
    fn new(stream: UnixStream) -> io::Result<Subscriber> {
        let (lines, waiting) = sync_channel(QUEUE);
        let output = stream.try_clone()?;
        let thread = thread::Builder::new()
            .name("subscriber".to_owned())
            .spawn(move || write(output, &waiting))?;
        Ok(Subscriber {
            lines,
            lost: 0,
            stream,
            thread,
        })
    }

    /// False: it is gone.
    fn send(&mut self, line: &Line) -> bool {
        let sent = match self.tell_lost() {
            Sent::Done => self.try_send(line),
            other => other,
        };
        if sent == Sent::Full {
            self.lost += 1;
        }
        sent != Sent::Gone
    }

    fn tell_lost(&mut self) -> Sent {
        if self.lost == 0 {
            return Sent::Done;
        }
        let sent = self.try_send(&line(&Message::Lost(self.lost)));
        if sent == Sent::Done {
            self.lost = 0;
        }
        sent
    }

    fn try_send(&self, line: &Line) -> Sent {
        match self.lines.try_send(Arc::clone(line)) {
            Ok(()) => Sent::Done,
            Err(TrySendError::Full(_)) => Sent::Full,
            Err(TrySendError::Disconnected(_)) => Sent::Gone,
        }
    }
}

/// Writes lines until there are no more, or nobody reads them.
fn write(mut stream: UnixStream, lines: &Receiver<Line>) {
    loop {
        match lines.recv_timeout(LOOK) {
            Ok(line) => {
                let mut text = line.to_string();
                while text.len() < WRITE {
                    let Ok(line) = lines.try_recv() else {
                        break;
                    };
                    text.push_str(&line);
                }
                if stream.write_all(text.as_bytes()).is_err() {
                    return;
                }
            }
            Err(RecvTimeoutError::Timeout) if !hung_up(&stream) => {}
            Err(_) => return,
        }
    }
}

fn hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    let events = poll(&mut fds, PollTimeout::ZERO).map(|_| fds[0].revents());
    events.is_ok_and(|events| events.is_some_and(|events| events.contains(PollFlags::POLLHUP)))
}

#[cfg(test)]
#[path = "socket_tests.rs"]
mod tests;
