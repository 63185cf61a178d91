//! What all workers share: the requests, the messages between them, and the dice.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use uniarm_decode::CacheRoot;
use uniarm_decode::drafting::{DraftMode, Pace, StepCost};
use uniarm_proto::MemberId;
use uniarm_router::LoadGuard;

use crate::dice::{Dice, Purpose};
use crate::queue::Queue;
use crate::report::Histogram;
use crate::setup::Setup;
use crate::trace::Arrival;

/// Bytes of a message beside its lists and tokens: frame, session, generation, position.
const MESSAGE_BYTES: usize = 24;

/// A worker of either pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Worker {
    Base(usize),
    Reward(usize),
}

/// What can happen.
pub(crate) enum Event {
    /// A request reaches its router.
    Arrive(usize),
    /// A base worker had no room; the router hears of it.
    Refused {
        request: usize,
    },
    /// A placed request reaches its base worker.
    Placed {
        base: usize,
        request: usize,
    },
    Ops {
        reward: usize,
        base: usize,
        ops: Vec<Op>,
    },
    Replies {
        base: usize,
        reward: usize,
        replies: Vec<Reply>,
        load: Load,
    },
    /// A session that every worker refused is tried again.
    Reopen {
        base: usize,
        request: usize,
    },
    Ends {
        worker: Worker,
        version: u64,
    },
    Wake(Worker),
    /// The autoscaler looks.
    Look,
    /// A pod that was started serves now.
    Started(Worker),
    /// A base worker that leaves has drained for as long as it may.
    Drained {
        base: usize,
    },
}

/// From a base to a reward worker, about one session.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Op {
    pub(crate) request: usize,
    pub(crate) epoch: u32,
    pub(crate) pace: Pace,
    pub(crate) kind: OpKind,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum OpKind {
    /// With so many tokens of the answer.
    Open {
        answer: usize,
    },
    /// The answer has this length now; drafts up to there were right.
    Advance {
        answer: usize,
    },
    /// The answer has this length now; its last token is not the drafted one.
    Rollback {
        answer: usize,
    },
    /// Named logits beyond the list.
    Query {
        position: usize,
    },
    Close,
}

/// From a reward to a base worker, about one session.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reply {
    pub(crate) request: usize,
    pub(crate) epoch: u32,
    pub(crate) kind: ReplyKind,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum ReplyKind {
    /// A list, and the draft that came with it.
    Row {
        position: usize,
        draft: Option<Drafted>,
    },
    Answer {
        position: usize,
    },
    /// There is no room for the session.
    Refused,
}

/// A draft: a token that is right or not, which the base worker finds out when it gets there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drafted {
    pub(crate) mode: DraftMode,
    pub(crate) right: bool,
}

/// What a reward worker says of itself with its replies.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    pub(crate) cost: StepCost,
    /// Sessions that are open.
    pub(crate) sessions: f64,
}

/// One request across its life.
#[derive(Default)]
pub(crate) struct Request {
    pub(crate) router: usize,
    /// Base workers that had no room.
    pub(crate) avoid: BTreeSet<MemberId>,
    pub(crate) attempts: usize,
    /// Counts on the members that it was placed on.
    pub(crate) load: Option<LoadGuard>,
    pub(crate) outcome: Option<Outcome>,
    /// Reward workers that serve it, best first.
    pub(crate) rewards: Vec<usize>,
    /// How many of them have refused it since the last row.
    pub(crate) refusals: usize,
    pub(crate) current: usize,
    /// The base worker that it has a place on.
    pub(crate) held_by: Option<usize>,
    pub(crate) accepted_at: Option<Duration>,

    /// Tokens of the answer.
    pub(crate) answer: usize,
    /// The base model's logits are known for positions below.
    pub(crate) rows: usize,
    /// Since when the latest of them are.
    pub(crate) rows_at: Duration,
    /// The reward's list is known for positions below.
    pub(crate) heard: usize,
    /// Drafts for the positions from `answer` on, as far as they have come.
    pub(crate) drafts: VecDeque<Drafted>,
    /// As it was set last, and as the reward worker hears of it with the next token.
    pub(crate) pace: Pace,
    /// The base worker's sequence has this many tokens beyond the prompt: the answer and drafts.
    pub(crate) laid: usize,
    /// Life of the session's drafts: replies to an earlier one are late.
    pub(crate) epoch: u32,
    /// Named logits are known for positions below.
    pub(crate) queried: usize,
    pub(crate) querying: bool,

    pub(crate) first_token_at: Option<Duration>,
    pub(crate) last_token_at: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Finished,
    Refused,
    Expired,
}

/// Counts that no single worker owns.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) inter_token: Histogram,
    /// Of first tokens since it was last taken, and of gaps.
    pub(crate) recent: [Histogram; 2],
    /// Seconds that guided tokens had their base rows and not their reward's.
    pub(crate) stalled: f64,
    /// Seconds from a request's acceptance to its last token so far.
    pub(crate) streamed: f64,
    /// Streams that a base worker handed over as it left, and sessions that a reward worker did.
    pub(crate) moved_streams: usize,
    pub(crate) moved_sessions: usize,
    pub(crate) tokens: u64,
    pub(crate) guided_tokens: u64,
    pub(crate) drafted: u64,
    pub(crate) accepted: u64,
    pub(crate) exchange_bytes: u64,
}

/// The state outside the workers.
pub(crate) struct World<'a> {
    pub(crate) setup: &'a Setup,
    pub(crate) arrivals: &'a [Arrival],
    pub(crate) requests: Vec<Request>,
    pub(crate) queue: Queue<Event>,
    pub(crate) tally: Tally,
    /// Reward workers that take sessions, where these come and go.
    pub(crate) rewards_here: Option<Vec<usize>>,
    dice: Dice,
    /// One for each preference, and one for each name of a shared prefix.
    preferences: HashMap<&'a str, u64>,
    prefixes: HashMap<&'a str, u64>,
}

// === impl Request ===

impl Request {
    /// Its base worker is gone: another one begins with the prompt and the answer so far, and with a session of its own.
    pub(crate) fn begin_again(&mut self) {
        self.held_by = None;
        self.load = None;
        self.avoid.clear();
        (self.attempts, self.refusals, self.current) = (0, 0, 0);
        (self.rows, self.laid) = (0, self.answer);
        self.forget_session();
    }

    /// Nothing that the reward worker has said beyond the answer counts any more.
    pub(crate) fn forget_session(&mut self) {
        self.epoch += 1;
        self.drafts.clear();
        self.heard = self.answer;
        (self.queried, self.querying) = (0, false);
    }
}

// === impl World ===

impl<'a> World<'a> {
    pub(crate) fn new(setup: &'a Setup, arrivals: &'a [Arrival]) -> Self {
        let number = |names: &mut dyn Iterator<Item = &'a str>| {
            let mut numbers = HashMap::new();
            for name in names {
                let next = numbers.len() as u64 + 1;
                numbers.entry(name).or_insert(next);
            }
            numbers
        };
        let preferences = number(&mut arrivals.iter().map(|arrival| arrival.preference.as_str()));
        let prefixes = number(&mut arrivals.iter().map(|arrival| arrival.prefix.as_str()));
        let mut queue = Queue::new();
        for (request, arrival) in arrivals.iter().enumerate() {
            let at = Duration::from_secs_f64(arrival.at) + setup.front.transit(0);
            queue.push(at, Event::Arrive(request));
        }
        Self {
            setup,
            arrivals,
            requests: arrivals.iter().map(|_| Request::default()).collect(),
            queue,
            tally: Tally::default(),
            rewards_here: None,
            dice: Dice::new(setup.seed),
            preferences,
            prefixes,
        }
    }

    /// Whose cache a session may share.
    pub(crate) fn root(&self, request: usize) -> CacheRoot {
        CacheRoot(self.preferences[self.arrivals[request].preference.as_str()])
    }

    /// A prompt: shared tokens, then its own.
    pub(crate) fn prompt(&self, request: usize) -> Vec<u32> {
        let arrival = &self.arrivals[request];
        let shared = u64::MAX - self.prefixes[arrival.prefix.as_str()];
        let token = |index: usize| {
            let owner = if index < arrival.prefix_tokens { shared } else { request as u64 };
            self.dice.words(Purpose::Token, owner, index as u32)[0] >> 1
        };
        (0..arrival.prompt_tokens).map(token).collect()
    }

    /// The same as a reward model reads it: after a system text of its own.
    pub(crate) fn steered_prompt(&self, request: usize) -> Vec<u32> {
        let text = u64::MAX / 2 - self.root(request).0;
        let word = |index| self.dice.words(Purpose::Token, text, index as u32)[0] >> 1;
        let mut tokens: Vec<u32> = (0..self.setup.system_tokens).map(word).collect();
        tokens.extend(self.prompt(request));
        tokens
    }

    pub(crate) fn steered_prompt_tokens(&self, request: usize) -> usize {
        self.setup.system_tokens + self.arrivals[request].prompt_tokens
    }

    /// Tokens of the answer from one position to another, as the base model chooses them.
    pub(crate) fn tokens(&self, request: usize, positions: std::ops::Range<usize>) -> Vec<u32> {
        let first = self.arrivals[request].prompt_tokens;
        let token =
            |position| self.dice.words(Purpose::Token, request as u64, (first + position) as u32)[0] >> 1;
        positions.map(token).collect()
    }

    /// The token that is drafted for a position: a wrong one is another token.
    pub(crate) fn draft_token(&self, request: usize, position: usize, drafted: Drafted) -> u32 {
        self.tokens(request, position..position + 1)[0] | (u32::from(!drafted.right) << 31)
    }

    /// A draft for a position. What one mode gets right, a better one does too.
    pub(crate) fn draft(&self, request: usize, position: usize, mode: DraftMode) -> Drafted {
        let acceptance = self.setup.drafting.acceptance(mode);
        let right = self.dice.happens(acceptance, Purpose::Acceptance, request as u64, position as u32);
        Drafted { mode, right }
    }

    /// Whether the list for a position proves the token.
    pub(crate) fn is_certified(&self, request: usize, position: usize) -> bool {
        let exchange = &self.setup.exchange;
        exchange.list_length == 0
            || self.dice.happens(exchange.certified, Purpose::Certificate, request as u64, position as u32)
    }

    /// The router's two random numbers for an attempt.
    pub(crate) fn placement_dice(&self, request: usize, attempt: usize) -> [u32; 2] {
        let [first, second, ..] = self.dice.words(Purpose::Placement, request as u64, attempt as u32);
        [first, second]
    }

    /// Puts a message of one base worker's turn on its way.
    pub(crate) fn send_ops(&mut self, at: Duration, base: usize, reward: usize, ops: Vec<Op>) {
        let bytes = ops.iter().map(|op| self.op_bytes(op)).sum();
        self.tally.exchange_bytes += bytes as u64;
        let at = at + self.setup.exchange_link.transit(bytes);
        self.queue.push(at, Event::Ops { reward, base, ops });
    }

    /// Puts a message of one reward worker's step on its way.
    pub(crate) fn send_replies(
        &mut self,
        at: Duration,
        [reward, base]: [usize; 2],
        replies: Vec<Reply>,
        load: Load,
    ) {
        let bytes = replies.iter().map(|reply| self.reply_bytes(reply)).sum();
        self.tally.exchange_bytes += bytes as u64;
        let at = at + self.setup.exchange_link.transit(bytes);
        self.queue.push(at, Event::Replies { base, reward, replies, load });
    }

    fn op_bytes(&self, op: &Op) -> usize {
        let tokens = match op.kind {
            OpKind::Open { answer } => self.arrivals[op.request].prompt_tokens + answer,
            OpKind::Advance { .. } | OpKind::Rollback { .. } => 1,
            OpKind::Query { .. } => 2,
            OpKind::Close => 0,
        };
        MESSAGE_BYTES + 4 * tokens
    }

    fn reply_bytes(&self, reply: &Reply) -> usize {
        let numbers = match (reply.kind, self.setup.exchange.list_length) {
            (ReplyKind::Row { .. }, 0) => self.setup.reward.cost.vocabulary(),
            // Ids and values, the normaliser and the floor.
            (ReplyKind::Row { draft, .. }, length) => 2 * length + 2 + usize::from(draft.is_some()),
            (ReplyKind::Answer { .. }, _) => 4,
            (ReplyKind::Refused, _) => 0,
        };
        MESSAGE_BYTES + 4 * numbers
    }

    /// Books a token that leaves the base worker at `at`.
    pub(crate) fn emit(&mut self, request: usize, at: Duration) {
        let Arrival { guided, at: asked_at, .. } = self.arrivals[request];
        let back = self.setup.front.transit(0);
        let state = &mut self.requests[request];
        let since = match state.last_token_at.replace(at) {
            Some(last) => {
                self.tally.inter_token.add(at - last);
                self.tally.recent[1].add(at - last);
                Some(last)
            }
            None => {
                state.first_token_at = Some(at);
                self.tally.recent[0].add(at + back * 2 - Duration::from_secs_f64(asked_at));
                state.accepted_at
            }
        };
        self.tally.streamed += since.map_or(0.0, |since| (at - since).as_secs_f64());
        if guided {
            self.tally.stalled += at.saturating_sub(state.rows_at).as_secs_f64();
        }
        self.tally.tokens += 1;
        self.tally.guided_tokens += u64::from(guided);
    }

    /// The moment from which a request's deadline counts.
    pub(crate) fn deadline(&self, request: usize) -> Option<Duration> {
        let arrival = &self.arrivals[request];
        arrival.timeout.map(|timeout| Duration::from_secs_f64(arrival.at + timeout))
    }
}
