// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads what chains report and gives it to everyone who follows, as long as nobody else does.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Error;

use super::{Duty, Failures};
use crate::monitor::Server;

/// Before it is tried again to be the reader.
const INTERVAL: Duration = Duration::from_secs(1);

/// The duty to fan events out.
pub struct FanOut {
    folder: PathBuf,
    server: Option<Server>,
    failures: Failures,
}

impl FanOut {
    pub fn new(folder: &Path) -> FanOut {
        FanOut {
            folder: folder.to_owned(),
            server: None,
            failures: Failures::default(),
        }
    }

    fn fail(&mut self, error: &Error) {
        self.failures.say(&format!("cannot read events: {error:#}"));
    }
}

impl Duty for FanOut {
    fn run(&mut self) -> Duration {
        if self.server.as_ref().is_some_and(Server::is_running) {
            return INTERVAL;
        }
        if let Some(Err(error)) = self.server.take().map(Server::stop) {
            self.fail(&error);
        }
        match Server::start(&self.folder) {
            // None: a follower who came first keeps reading; the next time may be the agent's.
            Ok(server) => self.server = server,
            Err(error) => self.fail(&error),
        }
        INTERVAL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_said() {
        let long = Path::new("/").join("x".repeat(100));
        let mut duty = FanOut::new(&long);
        duty.run();
        assert!(duty.failures.says("a shorter path"));
    }

    #[test]
    fn another_reader_is_no_failure() {
        let name = format!("/nonexistent/events-{}", std::process::id());
        let [mut first, mut second] = [(); 2].map(|()| FanOut::new(name.as_ref()));
        first.run();
        second.run();
        assert!(first.server.is_some() && second.server.is_none());
        assert!(!first.failures.says("") && !second.failures.says(""));
    }
}
