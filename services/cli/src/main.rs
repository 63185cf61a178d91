//! The `uniarm` binary: parse, wire, run. Its role is its subcommand.

// Before all others, which use its macros.
#[macro_use]
mod output;

mod adapters;
mod args;
mod batch;
mod bench;
mod bounds;
mod catalogue;
mod chat;
mod client;
mod complete;
mod demo;
mod demo_adapter;
mod device;
mod doctor;
mod eval;
mod failure;
mod front;
mod generate;
mod group;
mod job;
mod keys;
mod label;
mod local;
mod manual;
mod memory;
mod models;
mod oracle;
mod part;
mod process;
mod replay;
mod roles;
mod served;
mod side_by_side;
mod simulate;
mod status;
mod store;
mod tint;
mod tls;
mod train;
mod worker;

use args::{Cli, Command};

fn main() -> std::process::ExitCode {
    complete::answer_shell();
    let cli = Cli::of_process();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: no threads for the runtime: {error}");
            return std::process::ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        match cli.command {
            Command::Up(args) => Box::pin(roles::up(args)).await,
            Command::Router(args) => roles::router(args).await,
            Command::Base(args) => Box::pin(roles::base(args)).await,
            Command::Reward(args) => roles::reward(args).await,
            Command::Generate(args) => generate::run(args).await,
            Command::Chat(args) => chat::run(args).await,
            Command::Batch(args) => batch::run(args).await,
            Command::Models(args) => models::run(args).await,
            Command::Status(args) => status::run(args).await,
            Command::Replay(args) => replay::run(args).await,
            Command::Keys { command } => keys::run(&command),
            Command::Adapters(args) => adapters::run(args).await,
            Command::Label(args) => label::run(args).await,
            Command::Eval(args) => eval::run(args).await,
            Command::Bench(args) => bench::run(args).await,
            Command::Train(args) => tokio::task::block_in_place(|| train::run(&args)),
            Command::Oracle { command } => tokio::task::block_in_place(|| oracle::run(&command)),
            Command::Simulate(args) => simulate::run(*args).await,
            Command::Demo(args) => demo::run(args).await,
            Command::Doctor(args) => doctor::run(args).await,
            Command::Completions(args) => manual::completions(&args),
            Command::Man(args) => manual::man(&args),
        }
    });
    // A reading thread of a worker may still be in a forward: nobody waits for it.
    runtime.shutdown_background();
    match result {
        Ok(()) => {
            output::flush();
            std::process::ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {}", failure::sentence(&error));
            std::process::ExitCode::FAILURE
        }
    }
}
