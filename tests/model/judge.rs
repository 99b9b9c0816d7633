// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a chain must make of a packet, by the documents alone.

use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::rc::Rc;

use policy_chain::hook::{Family, Hook};
use policy_chain::replay::Verdict;
use serde_json::Value;

use crate::chain::{Action, Argument, Asks, Chain, Condition, End, File, Key, Number, OnError};
use crate::chain::{Mode, Selector, Then, Turns, What};
use crate::flows::{Flows, Openings};
use crate::layers::{self, FIN, Ip, PSH, Piece, RST, Reason, SYN, Segment, TCP, UDP, URG};
use crate::options::{self, MPTCP, MSS, NOP, Options, ROOM};
use crate::subflows::{self, ADD_ADDR, DSS, Flow, MP_PRIO, REMOVE_ADDR, Signals, Subflows};
use crate::sums::{self, Kind};
use crate::world::{self, Hop};

pub const MAIN: &str = "main";
/// Shortest Ethernet frame, without its check sequence.
const ETHERNET_MIN: usize = 60;
/// No header grows the packets of a test run past what the loopback device takes.
const MTU: usize = 65536;

/// Options with a length.
const KINDS: RangeInclusive<u64> = 2..=255;
/// RFC 7323, 2.3: 65535 shifted by 14 bits.
const WINDOW_MAX: u64 = 65535 << 14;

/// What must come of a packet.
#[derive(Clone, Debug)]
pub struct Expected {
    pub verdict: Verdict,
    pub frame: Vec<u8>,
    pub matched: bool,
    /// What everybody is told of its checksum.
    pub checksum: Option<Kind>,
    pub reasons: Vec<Reason>,
    /// What happened on the way, for statistics.
    pub events: Vec<Event>,
}

#[derive(Clone, Debug)]
pub enum Event {
    Selector {
        policy: String,
        matched: bool,
    },
    Action {
        policy: String,
        done: bool,
        changed: bool,
    },
}

/// A chain on a hook, and what it remembers.
pub struct Model {
    hook: Hook,
    file: Rc<File>,
    flows: Flows,
    subflows: Subflows,
    openings: Openings,
    /// How often actions were done, by chain, number, flow and protocol.
    turns: HashMap<(String, usize, Flow, u8), u64>,
}

/// The element that matched; `None` where none did.
type Element = Option<Argument>;

enum Step {
    Next,
    End(Verdict),
    Goto(String),
}

impl Model {
    pub fn new(file: &Value, hook: Hook) -> Model {
        Model {
            hook,
            file: Rc::new(File::new(file)),
            flows: Flows::default(),
            subflows: Subflows::default(),
            openings: Openings::default(),
            turns: HashMap::new(),
        }
    }

    /// Whether what it says of a packet depends on those before.
    pub fn remembers(&self) -> bool {
        let chains = self.file.0.values();
        let remembers = |action: &Action| match action.what {
            What::SetWindow { raw, .. } => !raw || action.turns != Turns::Always,
            What::StripOption { subtype, .. } => {
                subtype == Some(ADD_ADDR) || action.turns != Turns::Always
            }
            What::Count | What::Drop | What::Pass | What::Goto(_) => action.turns != Turns::Always,
            What::InsertOption { .. } | What::Redirect { .. } | What::SetMss { .. } => {
                action.turns != Turns::Always
            }
            _ => true,
        };
        chains.clone().flat_map(|it| &it.actions).any(remembers)
            || chains
                .flat_map(|it| it.alternatives.iter().flatten())
                .any(|selector| selector.asks == Asks::Tokens)
    }

    pub fn judge(&mut self, frame: &[u8]) -> Expected {
        self.flows.learn(frame);
        self.subflows.learn(frame);
        if let Some(new) = self.openings.learn(frame) {
            self.turns
                .retain(|(.., flow, protocol), _| (*flow, *protocol) != (new, TCP));
        }
        let mut packet = Expected {
            verdict: Verdict::Pass,
            frame: frame.to_vec(),
            matched: false,
            checksum: self.told(),
            reasons: Vec::new(),
            events: Vec::new(),
        };
        packet.verdict = self.enter(MAIN, &mut packet);
        packet
    }

    fn enter(&mut self, name: &str, packet: &mut Expected) -> Verdict {
        let file = Rc::clone(&self.file);
        let chain = &file.0[name];
        let Some(element) = self.select(chain, packet) else {
            return Verdict::Pass;
        };
        packet.matched |= name == MAIN;
        for (number, action) in chain.actions.iter().enumerate() {
            let before = packet.frame.clone();
            let turn = self.turn(name, number, action, &before);
            let step = match &turn {
                Ok(_) => self.act(action, &element, &mut packet.frame),
                Err(reason) => Err(*reason),
            };
            packet.events.push(Event::Action {
                policy: action.policy.clone(),
                done: step.is_ok(),
                changed: before != packet.frame,
            });
            if let (Ok(_), Ok(Some((flow, protocol)))) = (&step, turn) {
                let turn = (name.to_owned(), number, flow, protocol);
                *self.turns.entry(turn).or_default() += 1;
            }
            match step {
                Ok(Step::Next) => {}
                Ok(Step::End(verdict)) => return verdict,
                Ok(Step::Goto(name)) => return self.enter(&name, packet),
                Err("half_done") => {
                    packet.reasons.push("half_done");
                    return Verdict::Drop;
                }
                Err(reason) => {
                    packet.frame = before;
                    packet.reasons.push(reason);
                    match action.on_error {
                        _ if reason == "not_due" => {}
                        OnError::Continue => {}
                        OnError::Pass => return Verdict::Pass,
                        OnError::Drop => return Verdict::Drop,
                    }
                }
            }
        }
        match &chain.then {
            Then::Pass => Verdict::Pass,
            Then::Drop => Verdict::Drop,
            Then::Goto(name) => self.enter(name, packet),
        }
    }

    /// The flow whose turn it is, of an action that is not done to every packet.
    fn turn(
        &self,
        chain: &str,
        number: usize,
        action: &Action,
        frame: &[u8],
    ) -> Result<Option<(Flow, u8)>, Reason> {
        let Turns::First(most) = action.turns else {
            return Ok(None);
        };
        let ip = layers::ip(frame)?;
        let (flow, _) = subflows::flow(&ip, ip.ports(frame)?);
        let turn = (chain.to_owned(), number, flow, ip.protocol);
        let done = self.turns.get(&turn);
        match done.is_none_or(|done| *done < most) {
            true => Ok(Some((flow, ip.protocol))),
            false => Err("not_due"),
        }
    }

    /// The element of the alternative that matches.
    fn select(&self, chain: &Chain, packet: &mut Expected) -> Option<Element> {
        if chain.alternatives.is_empty() {
            return Some(None);
        }
        chain
            .alternatives
            .iter()
            .find_map(|alternative| self.all_match(alternative, packet))
    }

    fn all_match(&self, selectors: &[Selector], packet: &mut Expected) -> Option<Element> {
        let mut element = None;
        for selector in selectors {
            let found = match self.matches(selector, &packet.frame) {
                Ok(found) => found,
                Err(reason) => {
                    packet.reasons.push(reason);
                    return None;
                }
            };
            packet.events.push(Event::Selector {
                policy: selector.policy.clone(),
                matched: found.is_some(),
            });
            match (found, selector.not) {
                (Some(Some(key)), false) => element = key.argument.clone(),
                (Some(None), false) | (None, true) => {}
                (None, false) | (Some(_), true) => return None,
            }
        }
        Some(element)
    }

    /// Whether a selector matches, and the key by which it does.
    fn matches<'a>(
        &self,
        selector: &'a Selector,
        frame: &[u8],
    ) -> Result<Option<Option<&'a Key>>, Reason> {
        if selector.asks == Asks::Tokens {
            let signals = match Signals::of(frame) {
                Err("not_ip" | "not_tcp") => return Ok(None),
                other => other?,
            };
            let tokens = self.subflows.tokens(&signals);
            let keys = selector.keys.as_ref().unwrap();
            let wanted = |key: &&Key| key.token.is_some_and(|token| tokens.contains(&token));
            return Ok(keys.iter().find(wanted).map(Some));
        }
        let subject = match Subject::of(frame, selector.asks) {
            Err("not_ip" | "not_tcp") => return Ok(None),
            other => other?,
        };
        if selector.asks == Asks::PortsOnly && !subject.ip.has_ports() {
            return Ok(None);
        }
        let holds = |conditions: &[Condition]| {
            conditions
                .iter()
                .all(|condition| subject.meets(condition, self.hook))
        };
        if !holds(&selector.conditions) {
            return Ok(None);
        }
        if let Some(wanted) = &selector.signal {
            let found = wanted.is_in(&subject.options, subject.flags & SYN != 0)?;
            return Ok(found.then_some(None));
        }
        let Some(keys) = &selector.keys else {
            return Ok(Some(None));
        };
        let found = keys.iter().filter(|key| holds(&key.conditions));
        Ok(found.max_by_key(|key| key.length()).map(Some))
    }

    fn act(
        &mut self,
        action: &Action,
        element: &Element,
        frame: &mut Vec<u8>,
    ) -> Result<Step, Reason> {
        let number = |number: Number, range: RangeInclusive<u64>| match (number, element) {
            (Number::Is(value), _) => Ok(value),
            (Number::FromElement, None) => Err("no_element"),
            (Number::FromElement, Some(Argument::Number(value))) if range.contains(value) => {
                Ok(*value as u32)
            }
            (Number::FromElement, Some(_)) => Err("bad_argument"),
        };
        match &action.what {
            What::Count => {}
            What::Pass => return Ok(Step::End(Verdict::Pass)),
            What::Drop => return Ok(Step::End(Verdict::Drop)),
            What::Goto(Some(name)) => return Ok(Step::Goto(name.clone())),
            What::Goto(None) => {
                return match element {
                    None => Err("no_element"),
                    Some(Argument::Number(_)) => Err("bad_argument"),
                    Some(Argument::Chain(name)) if !self.file.0.contains_key(name) => {
                        Err("no_chain")
                    }
                    Some(Argument::Chain(name)) => Ok(Step::Goto(name.clone())),
                };
            }
            What::Redirect {
                neighbour,
                src_mac,
                dst_mac,
            } => {
                self.redirect(frame, *neighbour, *src_mac, *dst_mac)?;
                return Ok(Step::End(Verdict::Redirect));
            }
            What::InsertOption { kind, data, again } => {
                let kind = number(*kind, KINDS)? as u8;
                self.insert_option(frame, kind, data, *again)?;
            }
            What::StripOption {
                kind,
                subtype,
                mode,
                sure,
            } => {
                let kind = number(*kind, KINDS)? as u8;
                if (kind, *subtype, *mode) == (MPTCP, Some(ADD_ADDR), Mode::Auto) {
                    let signals = Signals::of(frame)?;
                    if signals.segment.ip.signed {
                        return Err("authenticated");
                    }
                    return self.take_announcements(frame, &signals);
                }
                self.strip_option(frame, kind, *subtype, *mode == Mode::Remove, *sure)?;
            }
            What::HoldAddAddr => {
                let signals = Signals::of(frame)?;
                if !self.subflows.knows(&signals) {
                    return Err("not_mptcp");
                }
                if signals.segment.ip.signed {
                    return Err("authenticated");
                }
                let slot = self.subflows.hold(frame, &signals)?;
                let taken = self.take_announcements(frame, &signals);
                if taken.is_err() {
                    self.subflows.release(&signals, slot);
                }
                return taken;
            }
            What::RestoreAddAddr { never, repeat } => {
                let signals = self.subflows.ready(frame)?;
                if signals.has(ADD_ADDR) {
                    return Err("option_present");
                }
                let held = self.subflows.held(&signals, *repeat).filter(|_| !never);
                let (slot, option) = held.ok_or("not_held")?;
                self.add(frame, &signals, ADD_ADDR, &option)?;
                match repeat {
                    true => self.subflows.give(&signals, slot),
                    false => self.subflows.release(&signals, slot),
                }
            }
            What::AddSubflow { address, id, port } => {
                let id = number(*id, 1..=255)? as u8;
                let signals = self.subflows.ready(frame)?;
                if signals.has(ADD_ADDR) {
                    return Err("option_present");
                }
                let option = self.subflows.announcement(&signals, *address, id, *port)?;
                self.add(frame, &signals, ADD_ADDR, &option)?;
            }
            What::RemoveAddr { id, sure } => {
                let id = number(*id, 0..=255)? as u8;
                let signals = self.subflows.ready(frame)?;
                if signals.has(REMOVE_ADDR) {
                    return Err("option_present");
                }
                if id == 0 && !sure {
                    return Err("unsafe");
                }
                let option = [MPTCP, 4, REMOVE_ADDR << 4, id];
                self.add(frame, &signals, REMOVE_ADDR, &option)?;
            }
            What::MpPrio { backup } => {
                let signals = self.subflows.ready(frame)?;
                let option = [MPTCP, 3, MP_PRIO << 4 | u8::from(*backup)];
                self.add(frame, &signals, MP_PRIO, &option)?;
            }
            What::ResetSubflow { reason, transient } => {
                self.reset(frame, *reason, *transient)?;
            }
            What::Learn => {
                layers::ip(frame)?.ports(frame)?;
            }
            What::Record => {
                layers::tcp(frame)?;
            }
            What::Report => {
                if !self.subflows.worth_reporting(&Signals::of(frame)?) {
                    return Err("not_reported");
                }
            }
            What::SetMss { bytes, clamp } => {
                let bytes = number(*bytes, 1..=0xffff)? as u16;
                self.set_mss(frame, bytes, *clamp)?;
            }
            What::SetWindow { bytes, raw, max } => {
                let most = if *raw { 0xffff } else { WINDOW_MAX };
                let bytes = number(*bytes, 0..=most)?;
                self.set_window(frame, bytes, *raw, *max)?;
            }
        }
        Ok(Step::Next)
    }

    /// What is said of the checksums of all packets: by the chain file, or on TC by the kernel,
    /// to which those of a test run are complete.
    fn told(&self) -> Option<Kind> {
        match self.hook.family() {
            Family::Xdp => self.file.0[MAIN].checksum,
            Family::Tc => Some(Kind::Complete),
        }
    }

    /// How far the checksum of a segment that is to be changed is done.
    fn checksum(&self, frame: &[u8], ip: &Ip) -> Result<Kind, Reason> {
        match self.told().unwrap_or_else(|| Kind::on_xdp(frame, ip)) {
            Kind::Unclear => Err("checksum_unclear"),
            kind => Ok(kind),
        }
    }

    /// Puts other bytes in the place of as many at `offset` of the TCP header.
    fn overwrite(
        &self,
        frame: &mut [u8],
        segment: &Segment,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), Reason> {
        let kind = self.checksum(frame, &segment.ip)?;
        overwrite_as(kind, frame, segment, offset, bytes);
        Ok(())
    }

    fn set_window(&self, frame: &mut [u8], bytes: u32, raw: bool, max: bool) -> Result<(), Reason> {
        let segment = layers::tcp_to_change(frame)?;
        if segment.has(SYN) {
            return Err("syn");
        }
        let field = if raw {
            bytes
        } else {
            let scale = self.flows.scale(&segment).ok_or("unknown_scale")?;
            (bytes >> scale).clamp(u32::from(bytes > 0), 0xffff)
        };
        let present = sums::read(frame, segment.ip.transport + 14);
        if max && u32::from(present) <= field {
            return Err("not_lower");
        }
        self.overwrite(frame, &segment, 14, &(field as u16).to_be_bytes())
    }

    fn set_mss(&self, frame: &mut [u8], bytes: u16, clamp: bool) -> Result<(), Reason> {
        let segment = layers::tcp_to_change(frame)?;
        if !segment.has(SYN) {
            return Err("not_syn");
        }
        let mut options = Options::parse(segment.options(frame))?;
        let mut found = options.list.iter_mut().filter(|option| option[0] == MSS);
        let option = found.next().ok_or("option_absent")?;
        if found.next().is_some() || option.len() != 4 {
            return Err("bad_option");
        }
        if clamp && sums::read(option, 2) <= bytes {
            return Err("not_lower");
        }
        option[2..].copy_from_slice(&bytes.to_be_bytes());
        self.overwrite(frame, &segment, 20, &options.bytes())
    }

    fn strip_option(
        &self,
        frame: &mut Vec<u8>,
        kind: u8,
        subtype: Option<u8>,
        remove: bool,
        sure: bool,
    ) -> Result<(), Reason> {
        let segment = layers::tcp_to_change(frame)?;
        if subtype.is_some() && kind != MPTCP {
            return Err("option_absent");
        }
        let takes_dss = kind == MPTCP && subtype.is_none_or(|subtype| subtype == DSS);
        if takes_dss && !sure && Signals::of(frame)?.has(DSS) {
            return Err("unsafe");
        }
        let mut options = Options::parse(segment.options(frame))?;
        let wanted = |option: &options::Bytes| {
            let first = option.get(2).map(|byte| byte >> 4);
            option[0] == kind && (subtype.is_none() || first == subtype)
        };
        if !options.list.iter().any(wanted) {
            return Err("option_absent");
        }
        if remove {
            options.list.retain(|option| !wanted(option));
            return self.shrink(frame, &segment, &options::fill(&options.trimmed(), 0));
        }
        for option in options.list.iter_mut().filter(|option| wanted(option)) {
            option.fill(NOP);
        }
        self.overwrite(frame, &segment, 20, &options.bytes())
    }

    /// Gives a segment an option space that may be shorter.
    fn shrink(&self, frame: &mut Vec<u8>, segment: &Segment, options: &[u8]) -> Result<(), Reason> {
        let by = segment.header - 20 - options.len();
        if by == 0 {
            return self.overwrite(frame, segment, 20, options);
        }
        let kind = self.checksum(frame, &segment.ip)?;
        if segment.ip.piece != Piece::Whole {
            return Err("fragment");
        }
        if !segment.is_bare() && kind == Kind::Partial {
            return Err("checksum_partial");
        }
        let mut after = frame.clone();
        if segment.is_bare() {
            let end = segment.ip.end - by;
            after.truncate(end.max(frame.len().min(ETHERNET_MIN)));
            // what the header leaves behind
            let left = after.len().min(segment.ip.end);
            after[end..left].fill(0);
        } else {
            after.drain(segment.payload() - by..segment.payload());
        }
        resize(frame, segment, kind, after, options);
        Ok(())
    }

    fn insert_option(
        &self,
        frame: &mut Vec<u8>,
        kind: u8,
        data: &[u8],
        again: bool,
    ) -> Result<(), Reason> {
        let segment = layers::tcp_to_change(frame)?;
        let present = Options::parse(segment.options(frame))?;
        if !again && present.of_kind(kind).next().is_some() {
            return Err("option_present");
        }
        let option = [&[kind, 2 + data.len() as u8], data].concat();
        self.put_behind(frame, &segment, &present, &option)
    }

    /// Adds an MPTCP option to a segment that has none of its subtype. Where nothing else makes
    /// room, it takes the place of DSS that only acknowledge.
    fn add(
        &self,
        frame: &mut Vec<u8>,
        signals: &Signals,
        subtype: u8,
        option: &[u8],
    ) -> Result<(), Reason> {
        if signals.has(subtype) {
            return Err("option_present");
        }
        let segment = &signals.segment;
        let mut present = Options::parse(segment.options(frame))?;
        let least = present.of_other_kinds(NOP).concat().len() + option.len();
        if self.subflows.dss_seen(signals) > 1
            && signals.acknowledges_only()
            && segment.is_bare()
            && least.next_multiple_of(4) > ROOM
        {
            let dss = |it: &options::Bytes| subflows::subtype(it) == Some(DSS);
            present.list.retain(|option| !dss(option));
        }
        self.put_behind(frame, segment, &present, option)
    }

    /// Overwrites announcements, or drops the packet of which one is all that is of MPTCP.
    fn take_announcements(&self, frame: &mut [u8], signals: &Signals) -> Result<Step, Reason> {
        let segment = &signals.segment;
        let mut options = Options::parse(segment.options(frame))?;
        let mut found = options
            .list
            .iter_mut()
            .filter(|it| subflows::announces(it))
            .peekable();
        if found.peek().is_none() {
            return Err("option_absent");
        }
        let edge = segment.has(SYN) || segment.has(FIN) || segment.has(RST);
        let all = segment.is_bare() && !signals.has(DSS) && !edge;
        if all && self.subflows.dss_seen(signals) < 2 {
            return Ok(Step::End(Verdict::Drop));
        }
        found.for_each(|option| option.fill(NOP));
        self.overwrite(frame, segment, 20, &options.bytes())?;
        Ok(Step::Next)
    }

    fn reset(&self, frame: &mut Vec<u8>, reason: u8, transient: bool) -> Result<(), Reason> {
        let signals = Signals::of(frame)?;
        if !self.subflows.knows(&signals) {
            return Err("not_mptcp");
        }
        let segment = &signals.segment;
        if segment.ip.signed {
            return Err("authenticated");
        }
        if segment.has(SYN) {
            return Err("syn");
        }
        if segment.has(RST) || !self.subflows.agree(&signals) {
            return Err("not_mptcp");
        }
        let mut present = Options::parse(segment.options(frame))?;
        present.list.retain(|option| option[0] != MPTCP);
        let option = [MPTCP, 4, 0x80 | u8::from(transient), reason];
        let kind = self.checksum(frame, &segment.ip);
        self.put_behind(frame, segment, &present, &option)?;
        let segment = layers::tcp(frame)?;
        let at = segment.ip.transport + 12;
        let flags = (sums::read(frame, at) | RST) & !(FIN | SYN | PSH | URG);
        overwrite_as(kind?, frame, &segment, 12, &flags.to_be_bytes());
        Ok(())
    }

    /// Gives a segment these options with another one behind them, by growing or in place of NOPs.
    fn put_behind(
        &self,
        frame: &mut Vec<u8>,
        segment: &Segment,
        present: &Options,
        option: &[u8],
    ) -> Result<(), Reason> {
        let room = segment.header - 20;
        let whole = segment.ip.piece == Piece::Whole;
        let may_grow_to = |length: usize| {
            let packet = segment.payload() - room + length - segment.ip.at;
            segment.is_bare() && whole && length <= ROOM && packet <= MTU
        };
        let with = |mut list: Vec<options::Bytes>| {
            list.push(option.to_vec());
            options::fill(&list, room)
        };
        let appended = with(present.trimmed());
        let squeezed = with(present.of_other_kinds(NOP));
        let options = if segment.is_bare()
            && whole
            && (appended.len() == room || may_grow_to(appended.len()))
        {
            appended
        } else if squeezed.len() == room || may_grow_to(squeezed.len()) {
            squeezed
        } else {
            return Err("no_room");
        };
        let by = options.len() - room;
        if by == 0 {
            return self.overwrite(frame, segment, 20, &options);
        }
        let kind = self.checksum(frame, &segment.ip)?;
        let mut after = frame.clone();
        if self.hook.family() == Family::Tc {
            // what a device summed up over the padding goes with it
            after.truncate(segment.ip.end);
        }
        after.resize(frame.len().max(segment.ip.end + by), 0);
        resize(frame, segment, kind, after, &options);
        Ok(())
    }

    fn redirect(
        &self,
        frame: &mut [u8],
        neighbour: bool,
        src_mac: Option<[u8; 6]>,
        dst_mac: Option<[u8; 6]>,
    ) -> Result<(), Reason> {
        let ip = layers::ip(frame);
        let (mut src, mut dst) = (src_mac, dst_mac);
        if neighbour {
            let ip = ip.as_ref().map_err(|reason| *reason)?;
            let at = ip.at + if ip.src.is_ipv4() { 8 } else { 7 };
            if frame[at] <= 1 {
                return Err("ttl_expired");
            }
            // the kernel compares the length of packets it knows with the MTU
            let fits = self.hook.family() == Family::Xdp || frame.len() <= world::LONGEST;
            match world::route(ip.src, ip.dst) {
                Hop::To { .. } if !fits => return Err("no_route"),
                Hop::Nowhere => return Err("no_route"),
                Hop::Unknown => return Err("no_neighbour"),
                Hop::To { own, next } => (src, dst) = (Some(own), Some(next)),
            }
        }
        if let (false, Ok(ip)) = (self.told() == Some(Kind::Complete), &ip) {
            finish(frame, ip)?;
        }
        if let Some(mac) = dst {
            frame[..6].copy_from_slice(&mac);
        }
        if let Some(mac) = src {
            frame[6..12].copy_from_slice(&mac);
        }
        match ip {
            Ok(ip) if neighbour => lower_ttl(frame, &ip),
            _ => {}
        }
        Ok(())
    }
}

/// Puts the frame `after`, of the length it shall have, and with another option space, in the
/// place of `frame`.
/// Puts other bytes in the place of as many at `offset` of the TCP header.
fn overwrite_as(kind: Kind, frame: &mut [u8], segment: &Segment, offset: usize, bytes: &[u8]) {
    let before = frame.to_vec();
    let at = segment.ip.transport + offset;
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    sums::update(kind, (&before, &segment.ip), (frame, &segment.ip));
}

fn resize(frame: &mut Vec<u8>, segment: &Segment, kind: Kind, mut after: Vec<u8>, options: &[u8]) {
    let at = segment.ip.transport + 20;
    after[at..at + options.len()].copy_from_slice(options);
    let words = (20 + options.len()) / 4;
    let low = after[segment.ip.transport + 12] & 0xf;
    after[segment.ip.transport + 12] = (words as u8) << 4 | low;
    let mut ip = segment.ip.clone();
    ip.end = ip.end + 20 + options.len() - segment.header;
    match ip.src {
        IpAddr::V4(_) => {
            let length = (ip.end - ip.at) as u16;
            sums::write(&mut after, ip.at + 2, length);
            sums::update_header(&frame[ip.at..ip.transport], &mut after[ip.at..ip.transport]);
        }
        IpAddr::V6(_) => {
            let length = (ip.end - ip.at - 40) as u16;
            sums::write(&mut after, ip.at + 4, length);
        }
    }
    sums::update(kind, (frame, &segment.ip), (&mut after, &ip));
    *frame = after;
}

/// Completes a checksum that nobody behind XDP would.
fn finish(frame: &mut [u8], ip: &Ip) -> Result<(), Reason> {
    let sums_up = [TCP, UDP].contains(&ip.protocol) && ip.piece == Piece::Whole;
    if !sums_up {
        return Ok(());
    }
    if ip.detour {
        return Err("checksum_unclear");
    }
    let at = sums::field_at(ip);
    if at + 2 > ip.end || at + 2 > frame.len() {
        return Ok(());
    }
    match Kind::on_xdp(frame, ip) {
        Kind::Complete => Ok(()),
        Kind::Partial | Kind::Unclear if ip.end > frame.len() => Err("checksum_partial"),
        Kind::Partial | Kind::Unclear => {
            sums::complete(frame, ip);
            Ok(())
        }
    }
}

fn lower_ttl(frame: &mut [u8], ip: &Ip) {
    match ip.src {
        IpAddr::V4(_) => {
            let header = ip.at..ip.transport.min(frame.len());
            let before = frame[header.clone()].to_vec();
            frame[ip.at + 8] -= 1;
            sums::update_header(&before, &mut frame[header]);
        }
        IpAddr::V6(_) => frame[ip.at + 7] -= 1,
    }
}

/// What a selector sees of a packet.
struct Subject {
    ip: Ip,
    ports: layers::Ports,
    flags: u16,
    options: Vec<u8>,
}

impl Subject {
    fn of(frame: &[u8], asks: Asks) -> Result<Subject, Reason> {
        if asks == Asks::Tcp || asks == Asks::Signals {
            let segment = layers::tcp(frame)?;
            return Ok(Subject {
                options: segment.options(frame).to_vec(),
                ip: segment.ip,
                ports: segment.ports,
                flags: segment.flags,
            });
        }
        let ip = layers::ip(frame)?;
        let ports = match asks {
            Asks::Ports | Asks::PortsOnly => ip.ports(frame)?,
            _ => (0, 0),
        };
        Ok(Subject {
            ip,
            ports,
            flags: 0,
            options: Vec::new(),
        })
    }

    fn meets(&self, condition: &Condition, hook: Hook) -> bool {
        let is_source = |end: End| match end {
            End::Src => true,
            End::Dst => false,
            End::Local => !hook.is_ingress(),
            End::Remote => hook.is_ingress(),
        };
        match condition {
            Condition::Address(end, network) if is_source(*end) => network.holds(self.ip.src),
            Condition::Address(_, network) => network.holds(self.ip.dst),
            Condition::Port(end, ports) if is_source(*end) => ports.holds(self.ports.0),
            Condition::Port(_, ports) => ports.holds(self.ports.1),
            Condition::EitherPort(ports) => ports.holds(self.ports.0) || ports.holds(self.ports.1),
            Condition::Protocol(protocol) => self.ip.protocol == *protocol,
            Condition::AllFlags(flags) => self.flags & flags == *flags,
            Condition::AnyFlag(flags) => self.flags & flags != 0,
            Condition::NoFlag(flags) => self.flags & flags == 0,
        }
    }
}
