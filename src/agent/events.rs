// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads what chains report and gives it to everyone who follows, as long as nobody else does.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Error;

use super::{Duty, log};
use crate::monitor::Server;

/// Before it is tried again to be the reader.
const INTERVAL: Duration = Duration::from_secs(1);
/// What fails again after it has worked for so long is said again.
const WELL: Duration = Duration::from_secs(60);

/// The duty to fan events out.
pub struct FanOut {
    folder: PathBuf,
    server: Option<Server>,
    started: Instant,
    /// Why it did not work the last time.
    said: Option<String>,
}

impl FanOut {
    pub fn new(folder: &Path) -> FanOut {
        FanOut {
            folder: folder.to_owned(),
            server: None,
            started: Instant::now(),
            said: None,
        }
    }

    fn start(&mut self) {
        match Server::start(&self.folder) {
            // None: a follower who came first keeps reading; the next time may be the agent's.
            Ok(server) => self.server = server,
            Err(error) => self.fail(&error),
        }
        self.started = Instant::now();
    }

    /// Says why, once for each reason.
    fn fail(&mut self, error: &Error) {
        let why = format!("cannot read events: {error:#}");
        if self.said.as_ref() != Some(&why) {
            log(&why);
        }
        self.said = Some(why);
    }
}

impl Duty for FanOut {
    fn run(&mut self) -> Duration {
        if self.server.as_ref().is_some_and(Server::is_running) {
            if self.started.elapsed() > WELL {
                self.said = None;
            }
            return INTERVAL;
        }
        if let Some(Err(error)) = self.server.take().map(Server::stop) {
            self.fail(&error);
        }
        self.start();
        INTERVAL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_said_once() {
        let long = Path::new("/").join("x".repeat(100));
        let mut duty = FanOut::new(&long);
        duty.run();
        let said = duty.said.clone();
        assert!(
            said.as_ref()
                .is_some_and(|why| why.contains("a shorter path")),
            "{said:?}"
        );
        duty.run();
        assert_eq!(duty.said, said);
        duty.fail(&anyhow::anyhow!("another reason"));
        assert_ne!(duty.said, said);
    }

    #[test]
    fn another_reader_is_no_failure() {
        let name = format!("/nonexistent/events-{}", std::process::id());
        let [mut first, mut second] = [(); 2].map(|()| FanOut::new(name.as_ref()));
        first.run();
        second.run();
        assert!(first.server.is_some() && second.server.is_none());
        assert_eq!((first.said, second.said), (None, None));
    }
}
