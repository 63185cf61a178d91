//! `uniarm train`: the configuration, the progress of a run, and the processes that share it.

mod workers;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use uniarm_model::OpenOptions;
use uniarm_trainer::network::DeviceName;
use uniarm_trainer::train::{
    config::TrainConfig,
    evaluation::Evaluation,
    events::{Began, Ended, Event, Step},
};

use crate::{args::COUNT_MAX, bounds, output, tls::TlsArgs};

/// Where runs go that name no folder.
const RUNS: &str = "runs";
/// Steps over which the shown rate and loss are averaged.
const SHOWN_OVER: f64 = 10.0;

/// Train a reward model on preference pairs.
///
/// CONFIG is a TOML file that names the frozen model, the files of pairs, the objectives and the adapter. The adapter,
/// in the form that reward workers serve, comes to stand in the run folder, beside the resolved configuration, the
/// metrics, their curve and the checkpoints. A run that was interrupted, in whatever way, goes on with --resume, and ends
/// with the same bytes as one that was not.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  uniarm train experiments/exact.toml --out runs/exact\n  uniarm train experiments/exact.toml --out runs/exact --resume"
)]
pub struct TrainArgs {
    /// The run, as TOML
    pub config: PathBuf,
    /// Continue the run in the run folder from its last checkpoint; begin it if there is none
    #[arg(long)]
    pub resume: bool,
    /// Run folder [default: that of the configuration, else runs/ and the configuration's name]
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// The frozen model, instead of the configuration's
    #[arg(long)]
    pub model: Option<String>,
    /// A file of pairs, instead of the configuration's; repeatable
    #[arg(long)]
    pub pairs: Vec<PathBuf>,
    /// Seed, instead of the configuration's
    #[arg(long)]
    pub seed: Option<u64>,
    /// Steps, instead of the configuration's steps or epochs
    #[arg(long)]
    pub steps: Option<u64>,
    /// Pairs of one step, instead of the configuration's
    #[arg(long, value_parser = bounds::within(0..=COUNT_MAX))]
    pub batch: Option<usize>,
    /// Peak of the learning rate, instead of the configuration's
    #[arg(long)]
    pub learning_rate: Option<f64>,
    /// The objective that a plain lora is trained for, instead of the configuration's
    #[arg(long)]
    pub objective: Option<String>,
    /// Processes of this machine among which each batch is divided, instead of the configuration's
    #[arg(long, value_parser = bounds::within(0..=COUNT_MAX))]
    pub workers: Option<usize>,
    /// Threads of each process [default: the cores of this machine, divided among the workers]
    #[arg(long, value_parser = bounds::within(0..=COUNT_MAX))]
    pub threads: Option<usize>,
    /// What to train on, instead of the configuration's: cpu, cuda, or cuda:N for the GPU of number N
    #[arg(long)]
    pub device: Option<DeviceName>,
    /// Which worker this is, from 0, where each is started by hand; worker 0 writes the run folder
    #[arg(long, requires = "size", requires = "rendezvous", conflicts_with = "workers", value_parser = bounds::within(0..=COUNT_MAX))]
    pub rank: Option<usize>,
    /// How many workers there are
    #[arg(long, requires = "rank", value_parser = bounds::within(0..=COUNT_MAX))]
    pub size: Option<usize>,
    /// Where worker 0 listens for the others (host:port)
    #[arg(long, requires = "rank")]
    pub rendezvous: Option<String>,
    #[command(flatten)]
    pub tls: TlsArgs,
    /// Tell what happens as JSON, one event a line, on standard output
    #[arg(long)]
    pub json: bool,
    /// Check configuration and pairs, print what would be trained, and exit
    #[arg(long)]
    pub check: bool,
}

/// Shows events to a person.
struct Display {
    bar: ProgressBar,
    /// Tokens per second, and loss; both a running mean.
    rate: Option<f64>,
    loss: Option<f64>,
    evaluation: String,
}

pub fn run(args: &TrainArgs) -> anyhow::Result<()> {
    let config = configuration(args)?;
    config.check().with_context(|| args.config.display().to_string())?;
    let out = run_folder(args, &config);
    let options = OpenOptions { progress: !args.json, ..OpenOptions::default() };
    if args.check {
        return check(&config, &uniarm_model::open(&config.model, &options)?);
    }
    output::work_unread();
    // Before the model is read: a worker that fails from here on is a connection that ends, and is noticed.
    let (ranks, _others) = workers::join(args, &config)?;
    let speaks = ranks.is_first();
    let model = uniarm_model::open(&config.model, &options)?;
    let mut display = Display::new();
    let mut watch = |event: &Event| match (speaks, args.json) {
        (false, _) => {}
        (true, true) => println!("{}", serde_json::to_string(event).expect("events are plain data")),
        (true, false) => display.show(event),
    };
    let ended = uniarm_trainer::train::train(&config, &model, &out, args.resume, ranks, &mut watch)?;
    if speaks && !args.json {
        conclude(&ended, &out);
    }
    Ok(())
}

fn configuration(args: &TrainArgs) -> anyhow::Result<TrainConfig> {
    let mut config = TrainConfig::read(&args.config)?;
    let given = args.clone();
    config.model = given.model.unwrap_or(config.model);
    if !given.pairs.is_empty() {
        config.pairs = given.pairs;
    }
    config.workers = given.size.or(given.workers).unwrap_or(config.workers);
    config.seed = given.seed.unwrap_or(config.seed);
    config.device = given.device.unwrap_or(config.device);
    config.batch = given.batch.unwrap_or(config.batch);
    config.objective = given.objective.or(config.objective);
    config.optimizer.learning_rate = given.learning_rate.unwrap_or(config.optimizer.learning_rate);
    if given.steps.is_some() {
        (config.steps, config.epochs) = (given.steps, None);
    }
    Ok(config)
}

fn run_folder(args: &TrainArgs, config: &TrainConfig) -> PathBuf {
    let by_name = || Path::new(RUNS).join(args.config.file_stem().unwrap_or_default());
    args.out.clone().or_else(|| config.out.clone()).unwrap_or_else(by_name)
}

fn check(config: &TrainConfig, model: &uniarm_model::ModelFiles) -> anyhow::Result<()> {
    let data = uniarm_trainer::train::data::Data::read(config, model)?;
    println!("{}", toml::to_string_pretty(config)?);
    let (training, held_out) = (data.training.len(), data.held_out.len());
    let steps = config.steps(training);
    eprintln!("{training} pairs to train on, {held_out} held out, {steps} steps of {}", config.batch);
    if !data.bad.0.is_empty() {
        eprintln!("{}", data.bad);
    }
    Ok(())
}

fn conclude(ended: &Ended, out: &Path) {
    let loss = ended.best_loss.map_or(String::new(), |loss| format!(", held-out loss {loss:.4}"));
    let early = if ended.stopped_early { "; stopped early: the held-out loss no longer fell" } else { "" };
    eprintln!("{} steps{early}. Best after step {}{loss}.", ended.step, ended.best_step);
    println!("{}", out.join("adapter").display());
}

// === impl Display ===

impl Display {
    fn new() -> Self {
        let bar = ProgressBar::new(0);
        let style = "{elapsed_precise} {wide_bar} {pos}/{len} steps, {msg}, {eta} left";
        bar.set_style(ProgressStyle::with_template(style).expect("a fixed template"));
        Self { bar, rate: None, loss: None, evaluation: String::new() }
    }

    fn show(&mut self, event: &Event) {
        match event {
            Event::Began(began) => self.begin(began),
            Event::Note { text } => self.say(text),
            Event::Evaluation(evaluation) => self.evaluation(evaluation),
            Event::Step(step) => self.step(step),
            Event::Checkpoint { .. } => {}
            Event::Ended(_) => self.bar.finish_and_clear(),
        }
    }

    fn begin(&mut self, began: &Began) {
        let Began { training_pairs, held_out_pairs, skipped_lines, parameters, workers, .. } = began;
        self.say(&format!(
            "{training_pairs} pairs to train on, {held_out_pairs} held out, {skipped_lines} lines left out; \
             {parameters} parameters, {workers} {}",
            if *workers == 1 { "worker" } else { "workers" }
        ));
        self.bar.set_length(began.steps);
        self.bar.set_position(began.step);
        self.bar.reset_eta();
    }

    fn step(&mut self, step: &Step) {
        let mixed = |shown: Option<f64>, new: f64| shown.map_or(new, |old| old + (new - old) / SHOWN_OVER);
        self.loss = Some(mixed(self.loss, step.loss));
        if let Some(timing) = step.timing {
            self.rate = Some(mixed(self.rate, timing.tokens as f64 / timing.seconds));
        }
        self.bar.set_position(step.step);
        let (loss, rate) = (self.loss.unwrap_or_default(), self.rate.unwrap_or_default());
        self.bar.set_message(format!("loss {loss:.4}{}, {rate:.0} tokens/s", self.evaluation));
    }

    fn evaluation(&mut self, found: &Evaluation) {
        let percent = |share: f64| format!("{:.0} %", share * 1e2);
        let corners = found.accuracy.iter().map(|(name, share)| format!("{name} {}", percent(*share)));
        let corners = corners.collect::<Vec<_>>().join(", ");
        self.evaluation = format!(", held out: {corners}, centre {}", percent(found.centre_accuracy));
        let better = if found.better { "; the best so far" } else { "" };
        self.say(&format!("step {}: held-out loss {:.4}{}{better}", found.step, found.loss, self.evaluation));
    }

    /// A line above the bar; also where standard error is no terminal, and there is no bar.
    fn say(&self, text: &str) {
        self.bar.suspend(|| eprintln!("{text}"));
    }
}
