// SPDX-License-Identifier: MIT OR Apache-2.0
//! Programs that run beside a test.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{eventually, text};

/// A running program, killed when dropped.
pub struct Spawned {
    child: Child,
    said: PathBuf,
}

impl Spawned {
    /// Starts a program whose standard output goes to the file `said`.
    pub fn printing(command: &mut Command, said: PathBuf) -> Spawned {
        let printed = File::create(&said).unwrap();
        let child = command.stdout(printed).stderr(Stdio::inherit()).spawn();
        let child = child.unwrap();
        Spawned { child, said }
    }

    /// Starts a program whose standard error goes to the file `said`.
    pub fn logging(command: &mut Command, said: PathBuf) -> Spawned {
        let log = File::create(&said).unwrap();
        let child = command.stdout(Stdio::null()).stderr(log).spawn();
        let child = child.unwrap();
        Spawned { child, said }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// All it has said so far.
    pub fn said(&self) -> String {
        text(&fs::read(&self.said).unwrap())
    }

    /// Waits until it has ended.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let id = self.id();
        eventually(&format!("process {id} ends"), || {
            self.child.try_wait().unwrap()
        })
    }

    /// By a signal that it heeds; its exit code.
    #[track_caller]
    pub fn end(&mut self, signal: Signal) -> Option<i32> {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
        self.wait().code()
    }

    /// Ends it by a signal that it heeds.
    #[track_caller]
    pub fn stop(mut self, signal: Signal) {
        assert_eq!(self.end(signal), Some(0), "{}", self.said());
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
