// SPDX-License-Identifier: MIT OR Apache-2.0
//! The longest way a packet can take through a graph.

use super::{Graph, MAX_TAIL_CALLS, Node, Successor};
use crate::error::Invalid;

/// Nodes shown at each end of a path that is too long.
const SHOWN: usize = 8;

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
            format!(
                "a path of {} nodes: {}",
                names.len(),
                shortened(&names).join(" -> ")
            ),
            format!("at most {MAX_TAIL_CALLS} nodes on a path, the kernel's limit of tail calls"),
        )
        .advice("join selectors into one with \"keys\" or a set, or take chains off the device"))
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

    fn length(&mut self, from: Successor) -> usize {
        let Successor::Node(index) = from else {
            return 0;
        };
        if let Some((length, _)) = self.known[index] {
            return length;
        }
        let node = &self.graph.nodes[index];
        let (length, next) = self
            .successors(node)
            .into_iter()
            .map(|next| (self.length(next), next))
            .max_by_key(|(length, _)| *length)
            .unwrap_or((0, Successor::Pass));
        self.known[index] = Some((length + 1, next));
        length + 1
    }

    /// Where a packet can go from a node: for a verdict map, every sub-chain.
    fn successors(&self, node: &Node) -> Vec<Successor> {
        let mut successors = vec![node.next, node.otherwise];
        if node.is_verdict_map() {
            successors.extend(self.graph.heads.values().copied());
        }
        successors
    }
}
