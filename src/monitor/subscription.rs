// SPDX-License-Identifier: MIT OR Apache-2.0
//! The events as everyone but the consumer gets them; who finds no consumer becomes it.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;

use super::event::Message;
use super::ring::Ring;
use super::socket::{Server, bind, connect, is_trusted, name, peer};
use super::{Source, time};
use crate::error::Refused;

/// How long to look for a server, or for a way to become it.
const SEARCH: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_millis(10);
/// Bytes to read at once.
const READ: usize = 64 << 10;

/// What chains of this network namespace report.
pub struct Events;

impl Events {
    /// Subscribes to what is reported from now on by the chains kept in `folder`.
    ///
    /// # Errors
    /// [`Refused`]: no permission, or somebody else's process has the events.
    pub fn subscribe(folder: &Path) -> Result<Subscription> {
        let owned = folder.to_owned();
        let make = move || -> Result<Box<dyn Source>> { Ok(Box::new(Ring::open(&owned)?)) };
        Subscription::new(name(folder)?, Box::new(make))
    }
}

type Make = Box<dyn Fn() -> Result<Box<dyn Source>> + Send>;

/// Events one after the other, without end. If the process that had them ends, another one takes
/// its place, maybe this one; of those reported meanwhile none is missing to who reads on.
pub struct Subscription {
    name: SocketAddr,
    make: Make,
    /// When it began, in nanoseconds of CLOCK_MONOTONIC: it is to have what is reported from then on,
    /// whoever reads that.
    since: u64,
    stream: UnixStream,
    /// What was read of the next line.
    begun: Vec<u8>,
    lines: VecDeque<Vec<u8>>,
    /// Behind the rest: it waits, when dropped, for its subscribers to go.
    server: Option<Server>,
}

impl Subscription {
    pub(super) fn new(name: SocketAddr, make: Make) -> Result<Subscription> {
        let since = time::monotonic()?;
        let (stream, server) = join(&name, since, &make)?;
        Ok(Subscription {
            name,
            make,
            since,
            stream,
            begun: Vec::new(),
            lines: VecDeque::new(),
            server,
        })
    }

    /// Whether this process is the consumer.
    pub fn is_server(&self) -> bool {
        self.server.is_some()
    }

    #[cfg(test)]
    pub(super) fn since(&self) -> u64 {
        self.since
    }

    /// The next message as JSON: what [`Message::from_json`] reads. `None` after `wait`, if that
    /// is given, or when a signal came.
    ///
    /// # Errors
    /// There will be no more.
    pub fn receive(&mut self, wait: Option<Duration>) -> Result<Option<Value>> {
        let end = wait.map(|wait| Instant::now() + wait);
        loop {
            if let Some(line) = self.lines.pop_front() {
                let value = serde_json::from_slice(&line);
                return value.map(Some).context("read an event");
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if !self.is_readable(left)? {
                return Ok(None);
            }
            self.read()?;
        }
    }

    fn is_readable(&self, wait: Option<Duration>) -> Result<bool> {
        // What is left is rounded up, or a loop would spin for the rest.
        let wait = wait.map(|wait| wait + Duration::from_micros(999));
        let wait = wait.map_or(PollTimeout::NONE, |wait| {
            PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
        });
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, wait) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(error) => Err(error).context("wait for events"),
        }
    }

    fn read(&mut self) -> Result<()> {
        let mut bytes = vec![0; READ];
        match self.stream.read(&mut bytes) {
            Ok(count) if count > 0 => {
                for part in bytes[..count].split_inclusive(|byte| *byte == b'\n') {
                    self.begun.extend_from_slice(part);
                    if part.ends_with(b"\n") {
                        self.lines.push_back(std::mem::take(&mut self.begun));
                    }
                }
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            // Whatever it is, this server is none any more.
            _ => self.rejoin(),
        }
    }

    fn rejoin(&mut self) -> Result<()> {
        if let Some(server) = self.server.take() {
            // It waits for all to hang up.
            drop(self.stream.shutdown(Shutdown::Both));
            server.stop()?;
        }
        self.begun.clear();
        // The stream before that ends only then, and so the server's wait for this one.
        (self.stream, self.server) = join(&self.name, self.since, &self.make)?;
        Ok(())
    }
}

impl Iterator for Subscription {
    type Item = Result<Message>;

    fn next(&mut self) -> Option<Result<Message>> {
        loop {
            match self.receive(None) {
                Ok(Some(value)) => return Some(Message::from_json(&value)),
                Ok(None) => {}
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// Connects to the server, or to one of its own. Of two that try at once, the one that binds is it.
fn join(name: &SocketAddr, since: u64, make: &Make) -> Result<(UnixStream, Option<Server>)> {
    const CONNECT: &str = "connect to the reader of events";
    let start = Instant::now();
    loop {
        match connect(name, since) {
            Ok(stream) => {
                check(&stream)?;
                return Ok((stream, None));
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error).context(CONNECT),
        }
        if let Some(listener) = bind(name)? {
            // Connected before it begins, we miss nothing of what it finds.
            let stream = connect(name, since).context(CONNECT)?;
            let server = Server::serve(listener, make()?)?;
            return Ok((stream, Some(server)));
        }
        if start.elapsed() > SEARCH {
            return Err(Refused::state(
                "no events can be had",
                "the process that holds their socket does not listen",
                "end it: ss -xlp | grep policy-chain/events",
            )
            .into());
        }
        thread::sleep(RETRY);
    }
}

/// Refuses events of who could make them up, and a server that will refuse us.
fn check(stream: &UnixStream) -> Result<()> {
    let user = peer(stream).context("see who reads events")?;
    if is_trusted(user) && (user != 0 || is_trusted_by_root()) {
        return Ok(());
    }
    let what = "the events belong to another user";
    let why = format!("a process of user {user} holds their socket");
    Err(match user {
        0 => Refused::denied(what, why, "run as root"),
        _ => Refused::state(what, why, "end it: ss -xlp | grep policy-chain/events"),
    }
    .into())
}

fn is_trusted_by_root() -> bool {
    nix::unistd::geteuid().is_root()
}
