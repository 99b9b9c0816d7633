// SPDX-License-Identifier: MIT OR Apache-2.0
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader, Read};
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};

use serde_json::Value;

use super::super::event::tests::samples;
use super::super::subscription::Subscription;
use super::super::time;
use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

/// Events of a test, made by hand, and when they were reported.
struct Fed(Receiver<(u64, Event)>);

/// Later than any subscriber began.
const LATE: u64 = u64::MAX;

impl Source for Fed {
    fn poll(&mut self, wait: Duration, sink: &mut dyn FnMut(u64, Event)) -> Result<()> {
        match self.0.recv_timeout(wait) {
            Ok((at, event)) => sink(at, event),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => anyhow::bail!("the source ran dry"),
        }
        self.0.try_iter().for_each(|(at, event)| sink(at, event));
        Ok(())
    }
}

fn unique(word: &str) -> SocketAddr {
    let name = format!("policy-chain-test/{}/{word}", std::process::id());
    SocketAddr::from_abstract_name(name).unwrap()
}

fn event(number: u64) -> Event {
    let mut event = samples().remove(0);
    event.time = super::super::Time(number);
    event
}

fn start(name: &SocketAddr) -> (Server, Sender<(u64, Event)>) {
    let (sender, receiver) = channel();
    let listener = bind(name).unwrap().unwrap();
    let server = Server::serve(listener, Box::new(Fed(receiver))).unwrap();
    (server, sender)
}

/// Of a subscriber that finds a server.
fn subscriber(name: &SocketAddr) -> Subscription {
    let make = || -> Result<Box<dyn Source>> { anyhow::bail!("it need not serve") };
    Subscription::new(name.clone(), Box::new(make)).unwrap()
}

/// Makes subscribers that serve where they find no server. There is one source for all of them.
fn heirs(
    name: &SocketAddr,
    receiver: Receiver<(u64, Event)>,
) -> impl Fn() -> Subscription + Sync + use<> {
    let source = Arc::new(Mutex::new(Some(receiver)));
    let name = name.clone();
    move || {
        let source = Arc::clone(&source);
        let make = move || -> Result<Box<dyn Source>> {
            Ok(Box::new(Fed(source.lock().unwrap().take().unwrap())))
        };
        Subscription::new(name.clone(), Box::new(make)).unwrap()
    }
}

fn receive(subscription: &mut Subscription) -> Message {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        if let Some(value) = subscription.receive(Some(PATIENCE)).unwrap() {
            return Message::from_json(&value).unwrap();
        }
    }
    panic!("no event came");
}

#[test]
fn everyone_gets_every_event() {
    let name = unique("all");
    let (server, sender) = start(&name);
    let mut subscribers: Vec<Subscription> = (0..3).map(|_| subscriber(&name)).collect();
    // They need not have been accepted yet.
    for number in 0..1000 {
        sender.send((LATE, event(number))).unwrap();
    }
    for subscriber in &mut subscribers {
        assert!(!subscriber.is_server());
        for number in 0..1000 {
            assert_eq!(receive(subscriber), Message::Event(event(number)));
        }
    }
    // One of them leaves, one comes.
    subscribers.remove(0);
    subscribers.push(subscriber(&name));
    sender.send((LATE, event(1000))).unwrap();
    for subscriber in &mut subscribers {
        assert_eq!(receive(subscriber), Message::Event(event(1000)));
    }
    assert_eq!(
        subscribers[0]
            .receive(Some(Duration::from_millis(20)))
            .unwrap(),
        None
    );
    assert!(server.is_running());
    server.stop().unwrap();
    assert!(bind(&name).unwrap().is_some());
}

#[test]
fn there_is_one_server() {
    let name = unique("one");
    let (server, _sender) = start(&name);
    assert!(bind(&name).unwrap().is_none());
    drop(server);
    assert!(bind(&name).unwrap().is_some());
}

#[test]
fn the_slow_lose_events_and_are_told() {
    const COUNT: u64 = 20_000;
    let name = unique("slow");
    let (server, sender) = start(&name);
    let slow = UnixStream::connect_addr(&name).unwrap();
    let mut quick = subscriber(&name);
    for number in 0..COUNT {
        sender.send((LATE, event(number))).unwrap();
        // The quick one is not held up by the slow one.
        if number % 1000 == 999 {
            for number in number - 999..=number {
                assert_eq!(receive(&mut quick), Message::Event(event(number)));
            }
        }
    }
    let (mut next, mut lost) = (0, 0);
    for line in BufReader::new(slow).lines() {
        let value: Value = serde_json::from_str(&line.unwrap()).unwrap();
        match Message::from_json(&value).unwrap() {
            Message::Event(event) => {
                assert_eq!(event.time.0, next);
                next += 1;
            }
            Message::Lost(count) => {
                lost += count;
                next += count;
            }
        }
        // Told even though no event follows.
        if next == COUNT {
            break;
        }
    }
    assert!(lost > 0 && lost < COUNT, "{lost}");
    server.stop().unwrap();
}

#[test]
fn stopping_waits_for_nobody_for_long() {
    let name = unique("stop");
    let (server, sender) = start(&name);
    let mut asleep = UnixStream::connect_addr(&name).unwrap();
    let mut quick = subscriber(&name);
    for number in 0..20_000 {
        sender.send((LATE, event(number))).unwrap();
        if number % 1000 == 999 {
            (0..1000).for_each(|_| drop(receive(&mut quick)));
        }
    }
    let start = Instant::now();
    server.stop().unwrap();
    assert!(start.elapsed() < GRACE + Duration::from_secs(2));
    // What was sent can be read still.
    let mut text = String::new();
    asleep.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("{\"event\":"), "{text}");
}

#[test]
fn who_finds_no_server_becomes_it() {
    let name = unique("become");
    let (sender, receiver) = channel();
    let mut first = heirs(&name, receiver)();
    assert!(first.is_server());
    let mut second = subscriber(&name);
    sender.send((LATE, event(1))).unwrap();
    assert_eq!(receive(&mut first), Message::Event(event(1)));
    assert_eq!(receive(&mut second), Message::Event(event(1)));
    // Without a source there is nothing more to be had, and it says why.
    drop(sender);
    let error = loop {
        match first.receive(Some(PATIENCE)) {
            Ok(None) => {}
            Ok(Some(value)) => panic!("{value}"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.to_string(), "the source ran dry");
}

#[test]
fn another_takes_over() {
    let name = unique("over");
    let (server, sender) = start(&name);
    let (next_sender, receiver) = channel();
    let mut heir = heirs(&name, receiver)();
    assert!(!heir.is_server());
    sender.send((LATE, event(1))).unwrap();
    assert_eq!(receive(&mut heir), Message::Event(event(1)));
    let mut witness = subscriber(&name);
    sender.send((LATE, event(2))).unwrap();
    next_sender.send((LATE, event(3))).unwrap();
    assert_eq!(receive(&mut witness), Message::Event(event(2)));
    drop(witness);
    server.stop().unwrap();
    assert_eq!(receive(&mut heir), Message::Event(event(2)));
    assert_eq!(receive(&mut heir), Message::Event(event(3)));
    assert!(heir.is_server());
}

/// Between two servers, one of whose followers is stuck, somebody else comes and reads.
#[test]
fn a_newcomer_takes_nothing_from_followers() {
    const LAST: u64 = 20_000;
    let name = unique("newcomer");
    let (server, sender) = start(&name);
    let stuck = UnixStream::connect_addr(&name).unwrap();
    thread::sleep(2 * TICK);
    let (next, receiver) = channel();
    let subscribe = heirs(&name, receiver);
    thread::scope(|scope| {
        let follower = scope.spawn(|| {
            let mut follower = subscribe();
            loop {
                match receive(&mut follower) {
                    Message::Event(event) if event.time.0 < LAST => {}
                    other => return (other, receive(&mut follower)),
                }
            }
        });
        thread::sleep(2 * TICK);
        // More than a socket holds, not so much at once that the other loses any.
        for number in 0..8_000 {
            sender.send((LATE, event(number))).unwrap();
            if number % 1000 == 999 {
                thread::sleep(TICK);
            }
        }
        // Reported before the newcomer is there.
        let reported = (time::monotonic().unwrap(), event(LAST));
        next.send(reported).unwrap();
        next.send((LATE, event(LAST + 1))).unwrap();
        let newcomer = scope.spawn(|| {
            // Once the server is about to end.
            thread::sleep(2 * TICK);
            let mut newcomer = subscribe();
            receive(&mut newcomer)
        });
        server.stop().unwrap();
        let [last, next] = [0, 1].map(|more| Message::Event(event(LAST + more)));
        assert_eq!(newcomer.join().unwrap(), next);
        assert_eq!(follower.join().unwrap(), (last, next));
    });
    drop(stuck);
}

#[test]
fn each_begins_at_its_own_time() {
    let name = unique("since");
    let (server, sender) = start(&name);
    let before = time::monotonic().unwrap();
    let mut all: Vec<Subscription> = (0..2)
        .map(|_| {
            thread::sleep(Duration::from_millis(1));
            subscriber(&name)
        })
        .collect();
    let since = all[1].since();
    for at in [before, since - 1, since] {
        sender.send((at, event(at))).unwrap();
    }
    assert_eq!(receive(&mut all[0]), Message::Event(event(since - 1)));
    for subscription in &mut all {
        assert_eq!(receive(subscription), Message::Event(event(since)));
    }
    server.stop().unwrap();
}

#[test]
fn many_at_once_have_one_server() {
    let name = unique("race");
    let (sender, receiver) = channel();
    let subscribe = heirs(&name, receiver);
    let mut all: Vec<Subscription> = thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(&subscribe)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert_eq!(all.iter().filter(|one| one.is_server()).count(), 1);
    sender.send((LATE, event(5))).unwrap();
    for one in &mut all {
        assert_eq!(receive(one), Message::Event(event(5)));
    }
}

#[test]
fn names_of_folders() {
    let text = |folder: &str| {
        name(folder.as_ref())
            .unwrap()
            .as_abstract_name()
            .unwrap()
            .to_vec()
    };
    assert_eq!(text("/tmp/."), b"policy-chain/events/tmp");
    assert_eq!(text("/nowhere/a"), b"policy-chain/events/nowhere/a");
    assert_eq!(
        text("/tmp/nowhere/a/"),
        b"policy-chain/events/tmp/nowhere/a"
    );
    let long = format!("/{}", "a".repeat(100));
    let error = name(long.as_ref()).unwrap_err();
    assert!(error.downcast_ref::<Refused>().is_some());
}
