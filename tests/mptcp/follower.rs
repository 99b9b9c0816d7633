// SPDX-License-Identifier: MIT OR Apache-2.0
//! Processes that follow events.

use std::fs;

use nix::sys::signal::Signal;
use policy_chain::testbed::Role;
use serde_json::Value;

use crate::common::spawned::Spawned;
use crate::common::{Environment, eventually};

/// `policy-chain events --json`, killed when dropped.
pub struct Follower(Spawned);

impl Follower {
    /// Starts one, and waits until it is to have every event from now on.
    pub fn start(environment: &Environment, role: Role, more: &[&str]) -> Follower {
        let before = followers(environment, role);
        let name = format!("events-{role}-{before}");
        let printed = environment.files.path().join(name);
        let mut command = environment.command(role, &[&["events", "--json"], more].concat());
        let follower = Follower(Spawned::printing(&mut command, printed));
        eventually("it follows", || {
            (followers(environment, role) > before).then_some(())
        });
        follower
    }

    /// What it has printed, as far as the lines are complete.
    pub fn lines(&self) -> Vec<String> {
        let printed = self.0.said();
        let lines = printed
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'));
        lines.map(|line| line.trim_end().to_owned()).collect()
    }

    pub fn events(&self) -> Vec<Value> {
        let lines = self.lines();
        let events = lines.iter().map(|line| serde_json::from_str(line));
        events.collect::<Result<_, _>>().unwrap()
    }

    /// Waits until it has told of so many events of a kind, and of nothing lost.
    #[track_caller]
    pub fn wait(&self, kind: &str, count: usize) {
        eventually(&format!("{count} times {kind}"), || {
            let events = self.events();
            assert!(events.iter().all(|it| it["event"] != "lost"), "{events:?}");
            let seen = events.iter().filter(|it| it["event"] == kind).count();
            (seen >= count).then_some(())
        });
    }

    /// By a signal that it heeds; its exit code.
    pub fn end(mut self, signal: Signal) -> Option<i32> {
        self.0.end(signal)
    }

    /// By SIGKILL.
    pub fn kill(self) {
        drop(self);
    }
}

/// Connections to the socket of events in a namespace: one a follower, that of the reader too.
pub fn followers(environment: &Environment, role: Role) -> usize {
    const CONNECTED: &str = "03";
    let name = format!("@policy-chain/events{}", environment.folder().display());
    let sockets = || fs::read_to_string("/proc/thread-self/net/unix").unwrap();
    let sockets = environment.namespace(role).enter(sockets).unwrap();
    let lines = sockets.lines().filter(|line| line.ends_with(&name));
    lines
        .filter(|line| line.split_whitespace().nth(5) == Some(CONNECTED))
        .count()
}
