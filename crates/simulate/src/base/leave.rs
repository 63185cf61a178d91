//! Workers that leave: a base worker that drains and then hands over, and sessions that move away from a reward worker.

use uniarm_decode::SequenceId;

use super::Base;
use crate::world::{OpKind, World};

/// How far a worker is on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopping {
    No,
    Drains,
    HandsOver,
}

// === impl Base ===

impl Base {
    /// It takes nothing new from now on.
    pub(crate) fn leave(&mut self) {
        self.stopping = Stopping::Drains;
    }

    /// With its next turn it hands over what still streams.
    pub(crate) fn drained(&mut self) {
        self.stopping = Stopping::HandsOver;
    }

    pub(crate) fn holds_nothing(&self) -> bool {
        self.requests == 0
    }

    /// The next reward worker in line, past those that have left.
    pub(super) fn next_reward(&self, request: usize, world: &mut World<'_>) {
        let World { requests, rewards_here, .. } = world;
        let state = &mut requests[request];
        let is_here = |reward: &usize| rewards_here.as_ref().is_none_or(|here| here.contains(reward));
        for _ in 0..state.rewards.len() {
            state.current = (state.current + 1) % state.rewards.len();
            if is_here(&state.rewards[state.current]) {
                return;
            }
        }
        // All that the placement named are gone: the router would name others.
        if let Some(here) = rewards_here.as_ref().filter(|here| !here.is_empty()) {
            (state.rewards, state.current) = (here.clone(), 0);
        }
    }

    /// A worker may have left since the request was placed.
    pub(super) fn pass_over_gone(&self, request: usize, world: &mut World<'_>) {
        let state = &world.requests[request];
        let current = state.rewards[state.current];
        if world.rewards_here.as_ref().is_some_and(|here| !here.contains(&current)) {
            self.next_reward(request, world);
        }
    }

    /// Moves the sessions of a reward worker that leaves.
    pub(super) fn leave_reward(&mut self, reward: usize, world: &mut World<'_>) {
        for request in self.guided.clone() {
            let state = &world.requests[request];
            if state.outcome.is_some() || state.rewards[state.current] != reward {
                continue;
            }
            self.push(request, OpKind::Close, world);
            let state = &mut world.requests[request];
            state.forget_session();
            if state.laid > state.answer {
                // Its drafts are void, verified or not.
                (state.laid, state.rows) = (state.answer, state.rows.min(state.answer + 1));
                let tokens = world.arrivals[request].prompt_tokens + state.laid;
                self.stepper.scheduler.truncate(SequenceId(request as u64), tokens);
            }
            self.next_reward(request, world);
            self.open(request, world);
            world.tally.moved_sessions += 1;
        }
    }

    /// Its time to drain is over: what still streams goes on elsewhere, with the answer so far.
    pub(super) fn hand_over(&mut self, world: &mut World<'_>) {
        let held = |world: &World<'_>, request: usize| world.requests[request].held_by == Some(self.number);
        let held: Vec<_> = (0..world.requests.len()).filter(|request| held(world, *request)).collect();
        self.touched.clear();
        self.unopened.clear();
        for request in std::mem::take(&mut self.guided) {
            self.push(request, OpKind::Close, world);
        }
        for request in held {
            self.stepper.scheduler.remove(SequenceId(request as u64));
            world.requests[request].begin_again();
            self.requests -= 1;
            self.moved.push(request);
            world.tally.moved_streams += 1;
        }
    }
}
