//! `uniarm bench`: measured beside what the machine can do at most.

pub mod args;
mod arrivals;
mod breakdown;
mod choose;
mod context;
pub mod cores;
mod draft;
mod exchange;
pub mod floor;
mod front;
mod load;
mod prompts;
mod rig;
mod simulation;
mod statistics;
mod step;
mod synthetic;

use args::{BenchArgs, BenchCommand};

pub async fn run(args: BenchArgs) -> anyhow::Result<()> {
    match args.command {
        BenchCommand::Step(args) => step::run(args).await,
        BenchCommand::Draft(args) => draft::run(args).await,
        BenchCommand::Context(args) => context::run(args).await,
        BenchCommand::Exchange(args) => exchange::run(args).await,
        BenchCommand::Choose(args) => choose::run(&args),
        BenchCommand::Load(args) => load::run(args).await,
        BenchCommand::Front(args) => front::run(args).await,
        BenchCommand::Simulation(args) => simulation::run(args).await,
    }
}
