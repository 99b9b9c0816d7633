// SPDX-License-Identifier: MIT OR Apache-2.0
//! The socket that makes one process the consumer, and gives its events to all others: a line of
//! JSON each.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, bind as bind_fd, connect as connect_fd,
    getsockopt, socket, sockopt::PeerCredentials,
};
use nix::unistd::geteuid;

use super::event::Message;
use super::ring::Ring;
use super::{Event, Source};
use crate::engine::store;
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
/// How long subscribers may take to read what is left and let go when the server stops.
const GRACE: Duration = Duration::from_secs(1);
/// Bytes to write at once, about.
const WRITE: usize = 32 << 10;
/// Names of subscribers' sockets begin so; from when on they want events follows.
const FOLLOWER: &str = "policy-chain/follower/";

/// The name that belongs to a folder: abstract, so that of one network namespace.
///
/// # Errors
/// [`Refused`] if the folder's path is too long.
pub(super) fn name(folder: &Path) -> Result<SocketAddr> {
    let folder = store::canonical(folder)?;
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

/// Takes the name; `None` if another has it.
pub(super) fn bind(name: &SocketAddr) -> Result<Option<UnixListener>> {
    match UnixListener::bind_addr(name) {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(None),
        Err(error) => Err(error).context("bind the socket of events"),
    }
}

/// Connects to a server, to have what was reported since a time of CLOCK_MONOTONIC, in nanoseconds:
/// it stands in the name of this end, so that the server knows it as soon as it accepts.
pub(super) fn connect(name: &SocketAddr, since: u64) -> io::Result<UnixStream> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let server = UnixAddr::new_abstract(name.as_abstract_name().unwrap_or_default())?;
    loop {
        let stream = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let own = format!("{FOLLOWER}{since}/{}/{number}", std::process::id());
        match bind_fd(stream.as_raw_fd(), &UnixAddr::new_abstract(own.as_bytes())?) {
            Ok(()) => {}
            // Of a process with the same number in another PID namespace.
            Err(Errno::EADDRINUSE) => continue,
            Err(errno) => return Err(errno.into()),
        }
        match connect_fd(stream.as_raw_fd(), &server) {
            Ok(()) => return Ok(UnixStream::from(stream)),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// From when on the other end wants events; who does not say gets whatever there is.
fn since(peer: &SocketAddr) -> u64 {
    let name = peer.as_abstract_name().unwrap_or_default();
    let name = std::str::from_utf8(name).ok();
    let since = name.and_then(|name| name.strip_prefix(FOLLOWER)?.split('/').next()?.parse().ok());
    since.unwrap_or(0)
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
    /// Becomes the consumer of what is reported in this network namespace. It also takes what is in
    /// the ring buffer already: of those whom another consumer served, some may not have it yet.
    ///
    /// `None` if there is a consumer already: subscribe to it.
    ///
    /// # Errors
    /// [`Refused`] if the folder's path is too long; no permission.
    pub fn start(folder: &Path) -> Result<Option<Server>> {
        let Some(listener) = bind(&name(folder)?)? else {
            return Ok(None);
        };
        Server::serve(listener, Box::new(Ring::open(folder)?)).map(Some)
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

    /// Lets the others read what is left, for a second, and go to whoever is next. Who does not read
    /// in that time misses what comes before it does.
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
    let mut events: Vec<(u64, Event)> = Vec::new();
    let mut result = Ok(());
    let begin = Instant::now();
    while begin.elapsed() < GATHER && !stop.load(Ordering::Relaxed) {
        subscribers.accept(&listener);
        thread::sleep(LULL);
    }
    while result.is_ok() && !stop.load(Ordering::Relaxed) {
        result = source.poll(TICK, &mut |at, event| events.push((at, event)));
        // First: who connected before an event was read is to have it.
        subscribers.accept(&listener);
        for (at, event) in events.drain(..) {
            subscribers.send(at, event);
        }
        subscribers.tell_lost();
    }
    subscribers.close();
    // From here on somebody else can be the consumer. Those who were served wait in the listener's
    // queue by now: they see its end before whoever comes next has begun.
    drop(listener);
    result
}

type Line = Arc<str>;

#[derive(Default)]
struct Subscribers(Vec<Subscriber>);

struct Subscriber {
    /// It is not told of what was reported before.
    since: u64,
    lines: SyncSender<Line>,
    /// Events not told, since it was last told so.
    lost: u64,
    stream: UnixStream,
    thread: JoinHandle<()>,
}

impl Subscribers {
    fn accept(&mut self, listener: &UnixListener) {
        // Of what fails here, the client sees that it is not connected any more.
        while let Ok((stream, name)) = listener.accept() {
            if peer(&stream).is_ok_and(is_trusted) {
                self.0.extend(Subscriber::new(stream, since(&name)));
            }
        }
    }

    /// Tells of an event that was reported at a time.
    fn send(&mut self, at: u64, event: Event) {
        if self.0.iter().all(|subscriber| at < subscriber.since) {
            return;
        }
        let line = line(&Message::Event(event));
        self.0
            .retain_mut(|subscriber| at < subscriber.since || subscriber.send(&line));
    }

    fn tell_lost(&mut self) {
        self.0
            .retain_mut(|subscriber| subscriber.tell_lost() != Sent::Gone);
    }

    /// Has all of them read what is left and hang up. They end at the same time: who has to wait
    /// for another would come to the next consumer too late.
    fn close(mut self) {
        self.tell_lost();
        let end = Instant::now() + GRACE;
        // Without `lines`, the threads end once they have written all.
        let ending = self.0.into_iter().map(|it| (it.stream, it.thread));
        let ending: Vec<(UnixStream, JoinHandle<()>)> = ending.collect();
        while Instant::now() < end && !ending.iter().all(|(stream, _)| hung_up(stream)) {
            thread::sleep(Duration::from_millis(5));
        }
        for (stream, _) in &ending {
            // Ends a write that nobody reads. It may be gone already.
            drop(stream.shutdown(Shutdown::Both));
        }
        for (_, thread) in ending {
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
    fn new(stream: UnixStream, since: u64) -> io::Result<Subscriber> {
        let (lines, waiting) = sync_channel(QUEUE);
        let output = stream.try_clone()?;
        let thread = thread::Builder::new()
            .name("subscriber".to_owned())
            .spawn(move || {
                write(&output, &waiting);
                // The other end reads what it has, and then that this was all.
                drop(output.shutdown(Shutdown::Write));
            })?;
        Ok(Subscriber {
            since,
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
fn write(mut stream: &UnixStream, lines: &Receiver<Line>) {
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
            Err(RecvTimeoutError::Timeout) if !hung_up(stream) => {}
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
