//! The pure core of UniARM: how a token is chosen, and which tokens a step computes.
//!
//! Nothing in this crate reads a clock, does I/O, draws a random number or knows a model: seeds, time and
//! logits are arguments, decisions are results. That is what makes the product's promise testable: a token
//! is a pure function of (models, request, position), so it is the same alone or in a batch, from whole rows
//! or from certified lists, on the first worker or on the one that took over.
//!
//! In reading order: what a request asks for ([`preference`]), the noise that stands for chance ([`noise`]),
//! how logits are reshaped ([`sampling`]) and combined ([`guidance`]), how a token is chosen from incomplete
//! knowledge ([`choose`]) and what that must equal ([`mod@reference`]), how tokens become text ([`text`]),
//! where their keys and values live ([`blocks`]), what is computed next ([`scheduler`]), and how
//! far drafts run ahead ([`drafting`]), whether that pays ([`trial`]), and who waits for whom ([`alignment`]).

// Blank lines keep the modules in reading order: rustfmt sorts neighbours.
#[macro_use]
mod widest;
mod elementary;

pub mod preference;

pub mod noise;

pub mod sampling;

pub mod guidance;

mod scan;

mod one_pass;

pub mod choose;
mod from_lists;

pub mod reference;

pub mod text;

pub mod blocks;

pub mod scheduler;

pub mod drafting;

pub mod trial;

pub mod alignment;

pub use blocks::{BlockId, CacheRoot};
pub use choose::{Choice, Chooser, Position};
pub use guidance::{
    ListError, Listed, NoisyRanking, Term, TermLogits, TopList, log_sum_exp, noisy_top_list, top_list,
    top_of_slice,
};
pub use noise::Noise;
pub use preference::{Preference, PreferenceError, PreferenceSpec};
pub use reference::choose_dense;
pub use sampling::{History, Sampling, SamplingError};
pub use scheduler::{
    AddError, ExtendError, NewSequence, PlannedRow, Priority, Scheduler, SchedulerOptions, SchedulerStats,
    SequenceId, StepPlan, Tenant,
};
pub use text::{TextDelta, TextStream};
