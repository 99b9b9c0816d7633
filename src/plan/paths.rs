// SPDX-License-Identifier: MIT OR Apache-2.0
//! The longest way a packet can take through a graph.

use super::{Graph, MAX_TAIL_CALLS, Node, Successor};
use crate::error::Invalid;
use crate::spec::Cadence;

/// Nodes shown at each end of a path that is too long.
const SHOWN: usize = 8;
/// Columns of a message.
const WIDTH: usize = 96;
/// Columns in front of a path on its first line, and on the lines after it.
const FIRST_LINE: usize = 36;
const INDENT: &str = "\n            ";

/// Checks that no path has more nodes than the kernel follows.
///
/// # Errors
/// The longest path.
pub(super) fn check(graph: &Graph) -> Result<(), Invalid> {
    let mut paths = Paths::new(graph);
    let path = paths.longest(graph.entry);
    if path.len() <= MAX_TAIL_CALLS {
        return Ok(());
    }
    let names: Vec<String> = path.iter().map(|at| graph.nodes[*at].name()).collect();
    let last = &graph.nodes[path[path.len() - 1]];
    Err(last
        .origin
        .invalid(
            "",
            format!("a path of {} nodes: {}", names.len(), text(&names)),
            format!("at most {MAX_TAIL_CALLS} nodes on a path, the kernel's limit of tail calls"),
        )
        .advice("join selectors into one with \"keys\" or a set, or take chains off the device"))
}

/// Names in the order of a path, on lines of a message.
pub(super) fn text(names: &[String]) -> String {
    let mut text = String::new();
    let mut width = FIRST_LINE;
    for (at, name) in shortened(names).iter().enumerate() {
        if at > 0 {
            text.push_str(" ->");
            let wraps = width + name.len() > WIDTH;
            text.push_str(if wraps { INDENT } else { " " });
            width = if wraps { INDENT.len() } else { width };
        }
        text.push_str(name);
        width += name.len() + " -> ".len();
    }
    text
}

fn shortened(names: &[String]) -> Vec<String> {
    if names.len() <= 2 * SHOWN {
        return names.to_vec();
    }
    let mut shown = names[..SHOWN].to_vec();
    shown.push(format!("({} more)", names.len() - 2 * SHOWN));
    shown.extend_from_slice(&names[names.len() - SHOWN..]);
    shown
}

/// The longest path from each node, worked out once.
struct Paths<'a> {
    graph: &'a Graph,
    /// Number of nodes on the longest path from a node, and the node behind it.
    known: Vec<Option<(usize, Successor)>>,
}

impl<'a> Paths<'a> {
    fn new(graph: &'a Graph) -> Self {
        Paths {
            graph,
            known: vec![None; graph.nodes.len()],
        }
    }

    fn longest(&mut self, from: Successor) -> Vec<usize> {
        self.length(from);
        let mut path = Vec::new();
        let mut at = from;
        while let Successor::Node(index) = at {
            path.push(index);
            at = self.known[index].map_or(Successor::Pass, |(_, next)| next);
        }
        path
    }

    /// Works out the longest path from a node and from all behind it. Not by recursion: a chain
    /// file may ask for more nodes than there is stack.
    fn length(&mut self, from: Successor) {
        let mut open: Vec<usize> = index_of(from).into_iter().collect();
        while let Some(index) = open.last().copied() {
            let successors = self.successors(&self.graph.nodes[index]);
            let indexes = successors.iter().copied().filter_map(index_of);
            let unknown: Vec<usize> = indexes.filter(|at| self.known[*at].is_none()).collect();
            if unknown.is_empty() {
                let lengths = successors
                    .into_iter()
                    .map(|next| (self.known_length(next), next));
                let longest = lengths.max_by_key(|(length, _)| *length);
                let (length, next) = longest.unwrap_or((0, Successor::Pass));
                self.known[index] = Some((length + 1, next));
                open.pop();
            } else {
                open.extend(unknown);
            }
        }
    }

    fn known_length(&self, from: Successor) -> usize {
        let known = index_of(from).and_then(|index| self.known[index]);
        known.map_or(0, |(length, _)| length)
    }

    /// Where a packet can go from a node: for a verdict map, every sub-chain.
    fn successors(&self, node: &Node) -> Vec<Successor> {
        let mut successors = vec![node.next, node.otherwise];
        if node.cadence != Cadence::Always {
            successors.push(node.later);
        }
        if node.is_verdict_map() {
            successors.extend(self.graph.heads.values().copied());
        }
        successors
    }
}

fn index_of(successor: Successor) -> Option<usize> {
    match successor {
        Successor::Node(index) => Some(index),
        _ => None,
    }
}
