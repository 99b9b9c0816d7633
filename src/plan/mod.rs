// SPDX-License-Identifier: MIT OR Apache-2.0
//! From chains to the control-flow graph that an attachment runs. Needs no kernel.
//!
//! A node is one selector or action. It goes on to one of two successors, each a node or a
//! verdict; a verdict is never a node. The graph has no cycles: sub-chains do not come back.

mod paths;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use crate::error::Invalid;
use crate::hook::{Family, Hook};
use crate::policy::btf::{self, CADENCE, OPENINGS};
use crate::policy::{Kind, Policy, Registry};
use crate::spec::{Action, Cadence, Chain, Keys, OnError, Origin, Spec, Then};

/// Tail calls a packet can make in the kernel, those that miss included.
pub const MAX_TAIL_CALLS: usize = 33;

/// The name of the action a chain without selectors and actions gets, so that it can be counted.
const COUNT: &str = "count";
/// What a node belongs to that is part of no chain. No name of a chain.
pub(crate) const ENTRY: &str = "(entry)";
/// The name of the node that remembers what packets tell of their connections.
const LEARNER: &str = "learner";
/// What a learner keeps, with the parameter that has it do so.
const LEARNT: [(&str, &str); 7] = [
    (btf::FLOWS, "handshakes"),
    (btf::SUBFLOWS, "subflows"),
    (btf::CONNECTIONS, "subflows"),
    (btf::KEYS, "secrets"),
    (btf::ACKS, "acks"),
    (btf::HELD, "held"),
    (OPENINGS, "openings"),
];
/// The name of the action that goes to a chain.
const GOTO: &str = "goto";

/// Where a packet goes from a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Successor {
    /// Index into [`Graph::nodes`].
    Node(usize),
    Pass,
    Drop,
}

/// One selector or action of one chain.
#[derive(Clone, Debug)]
pub struct Node {
    /// Name of the chain.
    pub chain: String,
    /// Id of the chain.
    pub chain_id: u32,
    /// Position among the nodes of its chain, selectors first.
    pub ordinal: usize,
    /// Name of the policy.
    pub policy: String,
    pub kind: Kind,
    /// After a match, or an action that was done.
    pub next: Successor,
    /// After a miss, or an action that gave up.
    pub otherwise: Successor,
    /// After an action whose turn it was not.
    pub later: Successor,
    /// A selector that matches what its policy does not.
    pub negate: bool,
    pub keys: Keys,
    pub params: Map<String, Value>,
    /// What a selector does to the argument in the packet's context when it matches.
    pub argument: ArgumentUse,
    /// An action that ends in a verdict of its own, or in another chain.
    pub terminal: bool,
    /// How often an action is done to the packets of one flow.
    pub cadence: Cadence,
    /// Whether the packets counted here are packets of the chain: the last selector of each
    /// alternative, or the first action of a chain without selectors.
    pub counts_for_chain: bool,
    /// Where the chain file has it.
    pub origin: Origin,
}

/// What a selector does to the argument in the packet's context when it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArgumentUse {
    Leave,
    /// Forget what an alternative before this one stored.
    Clear,
    /// Store the argument of the element that matched.
    Store,
}

/// What an attachment runs.
#[derive(Clone, Debug)]
pub struct Graph {
    pub nodes: Vec<Node>,
    /// Where every packet begins.
    pub entry: Successor,
    /// First node of each sub-chain in the graph, by chain id.
    pub heads: BTreeMap<u32, Successor>,
    /// Whether some node reads the packet's context.
    pub has_context: bool,
    /// The maps that nodes use and that are kept from one generation to the next, by name.
    pub state: BTreeSet<String>,
    /// Those of them that nodes look up and a learner fills, at this and the other direction's hook.
    pub reads: BTreeSet<String>,
    /// Those that a learner of this graph fills: it sees every packet first. Empty: there is none.
    pub learns: BTreeSet<String>,
}

impl Graph {
    /// What runs where no chain is attached.
    pub fn empty() -> Graph {
        Graph {
            nodes: Vec::new(),
            entry: Successor::Pass,
            heads: BTreeMap::new(),
            has_context: false,
            state: BTreeSet::new(),
            reads: BTreeSet::new(),
            learns: BTreeSet::new(),
        }
    }

    /// With a learner in front of all nodes that fills these maps too, if there are any.
    ///
    /// # Errors
    /// [`Invalid`] for a path that has no room for it.
    pub fn with_learner(mut self, maps: &BTreeSet<String>) -> Result<Graph, Invalid> {
        self.learns.extend(maps.iter().cloned());
        self.state.extend(maps.iter().cloned());
        if self.learns.is_empty() {
            return Ok(self);
        }
        if !self.nodes.last().is_some_and(Node::is_learner) {
            self.nodes.push(learner(self.entry));
            self.entry = Successor::Node(self.nodes.len() - 1);
            paths::check(&self)?;
        }
        let fills = LEARNT.iter().filter(|(map, _)| self.learns.contains(*map));
        let params = fills.map(|(_, param)| ((*param).to_owned(), Value::Bool(true)));
        if let Some(learner) = self.nodes.last_mut() {
            learner.params = params.collect();
        }
        Ok(self)
    }
}

impl Node {
    /// `CHAIN/ORDINAL:POLICY`, unique in a graph.
    pub fn name(&self) -> String {
        format!("{}/{}:{}", self.chain, self.ordinal, self.policy)
    }

    /// Whether this is the node that remembers what packets tell, which no chain has.
    pub fn is_learner(&self) -> bool {
        self.chain == ENTRY
    }

    /// Whether the argument of an element replaces one of the parameters.
    pub fn reads_argument(&self) -> bool {
        reads_argument(&self.params)
    }

    /// The chain a `goto` with a fixed target goes to.
    pub fn goto_target(&self) -> Option<&str> {
        if self.kind == Kind::Action && self.policy == GOTO {
            self.params.get("chain").and_then(Value::as_str)
        } else {
            None
        }
    }

    /// Whether an element of a set decides which chain is next.
    pub fn is_verdict_map(&self) -> bool {
        self.kind == Kind::Action && self.policy == GOTO && self.reads_argument()
    }
}

/// Compiles the chains of one hook of one device.
///
/// `chains`: those attached there, in any order. `subs`: every sub-chain, by name. `ids`: the id
/// of each of them.
///
/// # Errors
/// [`Invalid`] with the place in the chain file: sub-chains that go in circles or hold a verdict
/// map, a path of more than [`MAX_TAIL_CALLS`] nodes, a policy the hook does not have.
pub fn plan(
    hook: Hook,
    chains: &[&Chain],
    subs: &BTreeMap<String, &Chain>,
    ids: &BTreeMap<String, u32>,
    registry: &Registry,
) -> Result<Graph, Invalid> {
    let mut planner = Planner {
        hook,
        subs,
        ids,
        registry,
        nodes: Vec::new(),
        heads: BTreeMap::new(),
        entered: Vec::new(),
    };
    let mut ordered = chains.to_vec();
    ordered.sort_by(|a, b| (a.priority, &a.name).cmp(&(b.priority, &b.name)));
    let mut entry = Successor::Pass;
    for chain in ordered.into_iter().rev() {
        entry = planner.chain(chain, entry)?;
    }
    if planner.nodes.iter().any(Node::is_verdict_map) {
        for chain in subs.values() {
            planner.sub_chain(&chain.name, &chain.origin)?;
        }
    }
    let heads = planner
        .heads
        .iter()
        .filter_map(|(name, head)| Some((*ids.get(name)?, *head)))
        .collect();
    let edits = |node: &Node| hook.family() == Family::Tc && node.kind == Kind::Action;
    let has_context = |node: &Node| node.reads_argument() || edits(node);
    let mut state = BTreeSet::new();
    for node in &planner.nodes {
        let policy = match node.kind {
            Kind::Selector => registry.selector(&node.policy),
            Kind::Action => registry.action(&node.policy),
        };
        let used = policy.map_or(&[][..], |policy| policy.state_with(&node.params));
        state.extend(used.iter().cloned());
        if node.cadence != Cadence::Always {
            state.extend([CADENCE, OPENINGS].map(str::to_owned));
        }
    }
    let learnt = LEARNT.iter().filter(|(map, _)| state.contains(*map));
    let learns: BTreeSet<String> = learnt.map(|(map, _)| (*map).to_owned()).collect();
    let mut reads = learns.clone();
    // what passes this hook tells enough
    reads.remove(OPENINGS);
    let graph = Graph {
        has_context: planner.nodes.iter().any(has_context),
        nodes: planner.nodes,
        entry,
        heads,
        state,
        reads,
        learns: BTreeSet::new(),
    };
    paths::check(&graph)?;
    graph.with_learner(&learns)
}

/// The node that remembers what packets tell, and goes on with `next`.
fn learner(next: Successor) -> Node {
    Node {
        chain: ENTRY.to_owned(),
        chain_id: 0,
        ordinal: 0,
        policy: LEARNER.to_owned(),
        kind: Kind::Action,
        next,
        otherwise: next,
        later: next,
        negate: false,
        keys: Keys::None,
        params: Map::new(),
        argument: ArgumentUse::Leave,
        terminal: false,
        cadence: Cadence::Always,
        counts_for_chain: false,
        origin: Origin::default(),
    }
}

/// Plans every hook that the chains of a specification name, on their own: what can be found wrong
/// without a kernel and without devices.
///
/// # Errors
/// As [`plan`].
pub fn check(spec: &Spec, registry: &Registry) -> Result<(), Invalid> {
    let subs: BTreeMap<String, &Chain> = spec
        .chains
        .iter()
        .filter(|chain| chain.attach.is_empty())
        .map(|chain| (chain.name.clone(), chain))
        .collect();
    let attach = spec.chains.iter().flat_map(|chain| &chain.attach);
    let places: BTreeSet<(&str, Hook)> = attach
        .map(|attach| (attach.device.as_str(), attach.hook))
        .collect();
    let names = spec.chains.iter().map(|chain| chain.name.clone());
    let ids = names.zip(1u32..).collect();
    for (device, hook) in places {
        // A pattern that matches another, taken for a name, has devices in common with it.
        let here = |chain: &&Chain| chain.attach_at(device, hook).is_some();
        let chains: Vec<&Chain> = spec.chains.iter().filter(here).collect();
        plan(hook, &chains, &subs, &ids, registry)?;
    }
    Ok(())
}

struct Planner<'a> {
    hook: Hook,
    subs: &'a BTreeMap<String, &'a Chain>,
    ids: &'a BTreeMap<String, u32>,
    registry: &'a Registry,
    nodes: Vec<Node>,
    /// First node of each sub-chain compiled, by name.
    heads: BTreeMap<String, Successor>,
    /// Sub-chains being compiled, outermost first.
    entered: Vec<String>,
}

impl Planner<'_> {
    /// Compiles a chain, from its end to its beginning; `fallthrough` is where packets go that it
    /// does not take.
    fn chain(&mut self, chain: &Chain, fallthrough: Successor) -> Result<Successor, Invalid> {
        let then = match &chain.then {
            Then::Pass => Successor::Pass,
            Then::Drop => Successor::Drop,
            Then::Continue => fallthrough,
            Then::Goto(target) => self.sub_chain(target, &chain.origin)?,
        };
        let matched = self.actions(chain, then)?;
        let reads = chain.actions.iter().any(|a| reads_argument(&a.params));
        let mut missed = fallthrough;
        let mut ordinal = chain.selectors.len();
        for alternative in chain.alternatives().into_iter().rev() {
            let mut next = matched;
            for (at, selector) in alternative.iter().enumerate().rev() {
                self.supported(
                    self.registry.selector(&selector.policy),
                    &selector.policy,
                    &selector.origin,
                )?;
                ordinal -= 1;
                next = self.add(Node {
                    next,
                    otherwise: missed,
                    negate: selector.negate,
                    keys: selector.keys.clone(),
                    params: selector.params.clone(),
                    argument: match reads {
                        true if selector.keys != Keys::None && !selector.negate => {
                            ArgumentUse::Store
                        }
                        true if at == 0 => ArgumentUse::Clear,
                        _ => ArgumentUse::Leave,
                    },
                    counts_for_chain: at + 1 == alternative.len(),
                    origin: selector.origin.clone(),
                    ..self.node(chain, ordinal, Kind::Selector, &selector.policy)
                });
            }
            missed = next;
        }
        Ok(missed)
    }

    /// A node that does nothing yet.
    fn node(&self, chain: &Chain, ordinal: usize, kind: Kind, policy: &str) -> Node {
        Node {
            chain: chain.name.clone(),
            chain_id: self.ids.get(&chain.name).copied().unwrap_or_default(),
            ordinal,
            policy: policy.to_owned(),
            kind,
            next: Successor::Pass,
            otherwise: Successor::Pass,
            later: Successor::Pass,
            negate: false,
            keys: Keys::None,
            params: Map::new(),
            argument: ArgumentUse::Leave,
            terminal: false,
            cadence: Cadence::Always,
            counts_for_chain: false,
            origin: chain.origin.clone(),
        }
    }

    fn actions(&mut self, chain: &Chain, then: Successor) -> Result<Successor, Invalid> {
        let count = Action {
            policy: COUNT.to_owned(),
            on_error: OnError::Continue,
            keys: Keys::None,
            kind: None,
            cadence: None,
            params: Map::new(),
            references: Vec::new(),
            origin: chain.origin.clone(),
        };
        let actions = if chain.selectors.is_empty() && chain.actions.is_empty() {
            std::slice::from_ref(&count)
        } else {
            &chain.actions
        };
        let mut next = then;
        for (at, action) in actions.iter().enumerate().rev() {
            let policy = self.registry.action(&action.policy);
            let policy = self.supported(policy, &action.policy, &action.origin)?;
            self.values_supported(policy, action)?;
            let terminal = policy.terminal;
            let mut node = Node {
                next,
                otherwise: match action.on_error {
                    OnError::Continue => next,
                    OnError::Pass => Successor::Pass,
                    OnError::Drop => Successor::Drop,
                },
                later: next,
                params: action.params.clone(),
                keys: action.keys.clone(),
                terminal,
                cadence: action.cadence.unwrap_or(match policy.once {
                    true => Cadence::First(1),
                    false => Cadence::Always,
                }),
                counts_for_chain: chain.selectors.is_empty() && at == 0,
                origin: action.origin.clone(),
                ..self.node(
                    chain,
                    chain.selectors.len() + at,
                    Kind::Action,
                    &action.policy,
                )
            };
            if let Some(target) = node.goto_target() {
                node.next = self.sub_chain(target, &action.origin)?;
            }
            next = self.add(node);
        }
        Ok(next)
    }

    /// Compiles a sub-chain unless it is there already. What it does not take, passes.
    fn sub_chain(&mut self, name: &str, from: &Origin) -> Result<Successor, Invalid> {
        if let Some(head) = self.heads.get(name) {
            return Ok(*head);
        }
        if let Some(at) = self.entered.iter().position(|entered| entered == name) {
            let circle = [&self.entered[at..], &[name.to_owned()]].concat();
            return Err(from
                .invalid("", paths::text(&circle), "chains that end")
                .advice("remove one goto of the circle: a packet would run in it forever"));
        }
        // Each has a node at least.
        if self.entered.len() >= MAX_TAIL_CALLS {
            return Err(from
                .invalid(
                    "",
                    format!(
                        "one sub-chain after another: {}",
                        paths::text(&self.entered)
                    ),
                    format!(
                        "at most {MAX_TAIL_CALLS} nodes on a path, the kernel's limit of tail calls"
                    ),
                )
                .advice("join sub-chains into one"));
        }
        let Some(chain) = self.subs.get(name).copied() else {
            return Err(from.invalid("", format!("no chain \"{name}\""), "an existing sub-chain"));
        };
        if let Some(action) = chain.actions.iter().find(|a| is_verdict_map(a)) {
            return Err(action
                .origin
                .invalid(
                    "",
                    format!("a verdict map in the sub-chain \"{name}\""),
                    "{\"from\": \"element\"} in a chain with \"attach\" only",
                )
                .advice("name the chain in this goto: its elements could lead back to itself"));
        }
        self.entered.push(name.to_owned());
        let head = self.chain(chain, Successor::Pass)?;
        self.entered.pop();
        self.heads.insert(name.to_owned(), head);
        Ok(head)
    }

    fn supported<'p>(
        &self,
        policy: Option<&'p Policy>,
        name: &str,
        origin: &Origin,
    ) -> Result<&'p Policy, Invalid> {
        let Some(policy) = policy else {
            return Err(origin.invalid("", format!("\"{name}\""), "a policy of this program"));
        };
        if policy.runs_at(self.hook) {
            return Ok(policy);
        }
        Err(origin
            .invalid(
                "",
                format!("{name} on {}", self.hook),
                format!("one of the hooks {name} has: {}", policy.hooks.join(", ")),
            )
            .advice("attach the chain to another hook, or use another policy"))
    }

    /// Refuses a value of a parameter that the hook does not have.
    fn values_supported(&self, policy: &Policy, action: &Action) -> Result<(), Invalid> {
        let Some(field) = policy.missing_at(self.hook, &action.params) else {
            return Ok(());
        };
        let Some(only) = &field.only else {
            return Ok(());
        };
        let value = action.params.get(&field.name).unwrap_or(&Value::Null);
        Err(action
            .origin
            .invalid(
                &format!(".{}", field.name),
                format!("{value} on {}: {}", self.hook, only.why),
                format!("\"{}\" on {} only", only.value, only.hooks.join(", ")),
            )
            .advice("attach the chain to such a hook, or leave the parameter out"))
    }

    fn add(&mut self, node: Node) -> Successor {
        self.nodes.push(node);
        Successor::Node(self.nodes.len() - 1)
    }
}

fn is_verdict_map(action: &Action) -> bool {
    action.policy == GOTO && reads_argument(&action.params)
}

fn reads_argument(params: &Map<String, Value>) -> bool {
    params
        .values()
        .any(|value| value.get("from").and_then(Value::as_str) == Some("element"))
}
