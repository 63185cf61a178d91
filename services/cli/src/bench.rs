//! `uniarm bench`: measured beside what the machine can do at most.

mod floor;
mod step;
mod synthetic;

use crate::args::{BenchArgs, BenchCommand};

pub async fn run(args: BenchArgs) -> anyhow::Result<()> {
    match args.command {
        BenchCommand::Step(args) => step::run(args).await,
    }
}
