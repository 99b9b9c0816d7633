// SPDX-License-Identifier: MIT OR Apache-2.0
//! The agent beside the chains of a test.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use policy_chain::testbed::Role;

use super::{Environment, eventually};

/// A running agent, killed when dropped.
pub struct Agent {
    child: Child,
    said: PathBuf,
}

impl Agent {
    pub fn start(environment: &Environment, role: Role, name: &str) -> Agent {
        let said = environment.files.path().join(name);
        let child = environment
            .command(role, &["agent"])
            .stdout(Stdio::null())
            .stderr(File::create(&said).unwrap())
            .spawn()
            .unwrap();
        let agent = Agent { child, said };
        eventually("the agent is up", || {
            agent.said().contains("is up").then_some(())
        });
        agent
    }

    pub fn said(&self) -> String {
        fs::read_to_string(&self.said).unwrap()
    }

    /// Ends it by a signal that it heeds.
    pub fn stop(mut self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
        assert_eq!(
            self.child.wait().unwrap().code(),
            Some(0),
            "{}",
            self.said()
        );
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
