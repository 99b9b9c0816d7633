// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads what chains report and gives it to everyone who follows, as long as nobody else does.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Duty;
use crate::monitor::Server;

/// Before it is tried again to be the reader.
const INTERVAL: Duration = Duration::from_secs(1);

/// The duty to fan events out.
pub struct FanOut {
    folder: PathBuf,
    server: Option<Server>,
}

impl FanOut {
    pub fn new(folder: &Path) -> FanOut {
        FanOut {
            folder: folder.to_owned(),
            server: None,
        }
    }
}

impl Duty for FanOut {
    fn run(&mut self) -> Duration {
        if !self.server.as_ref().is_some_and(Server::is_running) {
            // A follower who came first keeps reading; the next time may be the agent's.
            self.server = Server::start(&self.folder).ok();
        }
        INTERVAL
    }
}
