//! An explicit-state checker: walks every state that a model can reach, and then asks whether each has a way to rest.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Something whose states can be walked.
pub trait Model {
    /// A state, in a form in which states that can't be told apart are equal.
    type State: Clone + Hash;
    /// Something that may happen in a state.
    type Move: Clone + Debug;

    /// Where it begins.
    fn initial(&self) -> Self::State;

    /// Everything that may happen in this state.
    fn moves(&self, state: &Self::State, moves: &mut Vec<Self::Move>);

    /// What a move leads to; `None` if it is none here after all.
    ///
    /// # Errors
    ///
    /// The rule that is broken, in words.
    fn step(&self, state: &Self::State, made: &Self::Move) -> Result<Option<Self::State>, String>;

    /// Looks at a state by itself.
    ///
    /// # Errors
    ///
    /// The rule that is broken, in words.
    fn check(&self, state: &Self::State) -> Result<(), String>;

    /// Whether a well-meaning world makes this move: only such moves count as a way to rest.
    fn is_polite(&self, state: &Self::State, made: &Self::Move) -> bool;

    /// Whether nothing is left to be done.
    fn is_at_rest(&self, state: &Self::State) -> bool;

    /// Told of each move that is made, once per state.
    fn visit(&mut self, state: &Self::State, made: &Self::Move);
}

/// A rule that was broken, and how to get there.
#[derive(Debug)]
pub struct Violation<M> {
    /// The rule, in words.
    pub rule: String,
    /// The moves from the beginning.
    pub path: Vec<M>,
}

/// The size of what was walked.
#[derive(Debug, Clone, Copy, Default)]
pub struct Walk {
    /// Different states.
    pub states: usize,
    /// Moves made, those that lead to a known state included.
    pub moves: usize,
    /// The longest of the shortest paths.
    pub depth: usize,
}

/// The edges by which a state was first reached, and the polite ones by which it can be left.
struct Graph {
    parents: Vec<(u32, u16)>,
    polite: Vec<(u32, u32)>,
    at_rest: Vec<u32>,
}

/// Walks all states breadth first.
///
/// States are told apart by 64 bits of SipHash: with 10^6 states, two are taken for one with a chance of 3 in 10^8.
///
/// # Errors
///
/// The first rule that is found broken, with a shortest path to it; [`Err`] as well if there are more than `limit`
/// states, as then nothing is exhausted.
pub fn walk<M: Model>(model: &mut M, limit: usize) -> Result<Walk, Violation<M::Move>> {
    let mut graph = Graph { parents: vec![(0, 0)], polite: Vec::new(), at_rest: Vec::new() };
    let mut known: HashMap<u64, u32> = HashMap::new();
    let mut frontier = VecDeque::new();
    let mut walk = Walk { states: 1, ..Walk::default() };
    let initial = model.initial();
    known.insert(fingerprint(&initial), 0);
    frontier.push_back((0_u32, 0_usize, initial));
    let mut moves = Vec::new();
    while let Some((index, depth, state)) = frontier.pop_front() {
        walk.depth = depth;
        if let Err(rule) = model.check(&state) {
            return Err(Violation { rule, path: path(model, &graph, index, None) });
        }
        if model.is_at_rest(&state) {
            graph.at_rest.push(index);
        }
        moves.clear();
        model.moves(&state, &mut moves);
        for (number, made) in moves.iter().enumerate() {
            let next = match model.step(&state, made) {
                Ok(Some(next)) => next,
                Ok(None) => continue,
                Err(rule) => return Err(Violation { rule, path: path(model, &graph, index, Some(made)) }),
            };
            model.visit(&state, made);
            walk.moves += 1;
            let target = match known.entry(fingerprint(&next)) {
                Entry::Occupied(entry) => *entry.get(),
                Entry::Vacant(entry) => {
                    let target = u32::try_from(walk.states).unwrap_or(u32::MAX);
                    entry.insert(target);
                    graph.parents.push((index, u16::try_from(number).unwrap_or(u16::MAX)));
                    walk.states += 1;
                    if walk.states > limit {
                        let rule = format!("more than {limit} states: the scope isn't exhausted");
                        return Err(Violation { rule, path: Vec::new() });
                    }
                    frontier.push_back((target, depth + 1, next));
                    target
                }
            };
            if target != index && model.is_polite(&state, made) {
                graph.polite.push((target, index));
            }
        }
    }
    match stranded(&mut graph, walk.states) {
        None => Ok(walk),
        Some(index) => {
            let rule = "rule 7: from here a well-meaning world has no way to rest".to_owned();
            Err(Violation { rule, path: path(model, &graph, index, None) })
        }
    }
}

fn fingerprint(state: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    state.hash(&mut hasher);
    hasher.finish()
}

/// A state from which rest can't be reached by polite moves, if there is one (AG EF, by reverse reachability).
fn stranded(graph: &mut Graph, states: usize) -> Option<u32> {
    graph.polite.sort_unstable();
    let mut first = vec![0_usize; states + 1];
    for (target, _) in &graph.polite {
        first[*target as usize + 1] += 1;
    }
    for index in 0..states {
        first[index + 1] += first[index];
    }
    let mut can_rest = vec![false; states];
    let mut open = std::mem::take(&mut graph.at_rest);
    for index in &open {
        can_rest[*index as usize] = true;
    }
    while let Some(index) = open.pop() {
        let index = index as usize;
        for (_, source) in &graph.polite[first[index]..first[index + 1]] {
            if !can_rest[*source as usize] {
                can_rest[*source as usize] = true;
                open.push(*source);
            }
        }
    }
    can_rest.iter().position(|can| !can).and_then(|index| u32::try_from(index).ok())
}

/// The moves that lead to a state, found by making them again.
fn path<M: Model>(model: &M, graph: &Graph, mut index: u32, last: Option<&M::Move>) -> Vec<M::Move> {
    let mut numbers = Vec::new();
    while index != 0 {
        let (parent, number) = graph.parents[index as usize];
        numbers.push(number);
        index = parent;
    }
    let mut state = model.initial();
    let mut path = Vec::new();
    for number in numbers.into_iter().rev() {
        let mut moves = Vec::new();
        model.moves(&state, &mut moves);
        let Some(made) = moves.into_iter().nth(usize::from(number)) else { break };
        let Ok(Some(next)) = model.step(&state, &made) else { break };
        path.push(made);
        state = next;
    }
    path.extend(last.cloned());
    path
}
