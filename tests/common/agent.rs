// SPDX-License-Identifier: MIT OR Apache-2.0
//! The agent beside the chains of a test.

use nix::sys::signal::Signal;
use policy_chain::testbed::Role;

use super::spawned::Spawned;
use super::{Environment, eventually};

/// A running agent, killed when dropped.
pub struct Agent(Spawned);

impl Agent {
    pub fn start(environment: &Environment, role: Role, name: &str) -> Agent {
        let said = environment.files.path().join(name);
        let agent = Spawned::logging(&mut environment.command(role, &["agent"]), said);
        eventually("the agent is up", || {
            agent.said().contains("is up").then_some(())
        });
        Agent(agent)
    }

    pub fn said(&self) -> String {
        self.0.said()
    }

    /// Ends it by a signal that it heeds.
    #[track_caller]
    pub fn stop(self, signal: Signal) {
        self.0.stop(signal);
    }

    /// By SIGKILL.
    pub fn kill(self) {
        drop(self);
    }
}
