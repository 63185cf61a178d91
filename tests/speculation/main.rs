//! Drafts never change a token: engines over scripted models, whose agreement is anything from none to perfect, joined by
//! a link that delays, repeats, reorders and breaks, answer exactly as in lock-step over a link that does nothing.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

mod chaos;

use std::{sync::Arc, time::Duration};

use chaos::{Chaos, ChaosScorer};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use uniarm_base::{
    BaseEngine, BaseHandle, BaseOptions, BaseSettings, DraftRows, DraftWindow, PaceOptions, Scorer,
};
use uniarm_engine::{ExecutorOptions, likeliest};
use uniarm_model::{ScriptedForward, ScriptedLists, ScriptedOptions, Tokenizer};
use uniarm_proto::{
    Exchange, GenerateRequest, Generation, GuidanceTerm, Input, MemberId, OnRewardLoss, Placed, Priority,
    Progress, RewardWorker, Sampling, Transcript, pb,
};
use uniarm_reward::{Backbone, RewardCatalogue, RewardEngine, RewardHandle, RewardOptions};
use uniarm_runtime::Metrics;

const VOCABULARY: usize = 160;
const REQUESTS: usize = 24;

/// The reward model that is its backbone as it is, and one under a system text.
const PLAIN: &str = "plain";
const PROMPTED: &str = "prompted";

/// A base and a reward model, and how they are run.
#[derive(Clone, Copy, Debug)]
struct Scene {
    /// How much of a logit base and reward model share.
    agreement: f32,
    /// The reward's backbone is the base model.
    twins: bool,
    /// Blocks of each cache: few mean preemption.
    blocks: usize,
    step_tokens: usize,
    /// Tokens of a reward's list.
    list_length: u32,
    /// Both models give lists, and keep so many rows behind them; `None`: they give rows.
    lists: Option<usize>,
    /// What a step of the base model takes besides.
    base_step: Duration,
    pace: PaceOptions,
    chaos: Chaos,
}

impl Scene {
    /// Lock-step and whole rows over a perfect link.
    const fn reference(self) -> Self {
        let pace = PaceOptions { window: DraftWindow::Fixed(0), rows: DraftRows::Auto };
        Self { pace, chaos: Chaos::NONE, blocks: 4096, step_tokens: 512, lists: None, ..self }
    }

    fn model(&self, seed: u64, step: Duration) -> Box<ScriptedForward> {
        Box::new(ScriptedForward::new(ScriptedOptions {
            vocabulary: VOCABULARY,
            blocks: self.blocks,
            seed: if self.twins { 1 } else { seed },
            agreement: self.agreement,
            step,
            lists: self.lists.map(|kept| ScriptedLists { ranking: likeliest::rank, kept }),
            ..ScriptedOptions::default()
        }))
    }

    fn executor(&self) -> ExecutorOptions {
        ExecutorOptions { step_tokens: self.step_tokens, ..ExecutorOptions::default() }
    }

    fn reward(&self, tokenizer: Tokenizer, metrics: &Metrics) -> RewardHandle {
        let mut catalogue = RewardCatalogue::new(Backbone {
            name: "scripted".into(),
            fingerprint: [if self.twins { 1 } else { 2 }; 32],
            tokenizer,
            template: None,
            context_tokens: 1024,
            vocabulary: VOCABULARY,
        });
        catalogue.add_plain(PLAIN).unwrap();
        catalogue.add_prompted(PROMPTED, "t7 t8 t9").unwrap();
        let options = RewardOptions { executor: self.executor(), ..RewardOptions::default() };
        RewardEngine::start(self.model(2, Duration::ZERO), catalogue, &options, metrics).unwrap()
    }

    fn base(&self, tokenizer: Tokenizer, scorer: Arc<dyn Scorer>) -> BaseHandle {
        let settings = BaseSettings {
            model: "scripted".into(),
            fingerprint: [1; 32],
            tokenizer,
            template: None,
            context_tokens: 1024,
            vocabulary: VOCABULARY,
            exchange: Exchange::Certified,
            list_length: self.list_length,
        };
        let options = BaseOptions { executor: self.executor(), pace: self.pace, ..BaseOptions::default() };
        BaseEngine::start(self.model(1, self.base_step), settings, scorer, &options, &Metrics::new()).unwrap()
    }

    async fn answers(&self, requests: &[GenerateRequest]) -> Vec<Transcript> {
        self.counted(requests).await.0
    }

    /// The answers, and the reward worker's metrics after them.
    async fn counted(&self, requests: &[GenerateRequest]) -> (Vec<Transcript>, String) {
        let metrics = Metrics::new();
        let reward = self.reward(ScriptedForward::tokenizer(VOCABULARY), &metrics);
        let scorer = Arc::new(ChaosScorer::new(reward, self.chaos));
        let base = self.base(ScriptedForward::tokenizer(VOCABULARY), scorer);
        let tasks: Vec<_> =
            requests.iter().map(|request| tokio::spawn(answer(base.clone(), request.clone()))).collect();
        let mut transcripts = Vec::new();
        for task in tasks {
            transcripts.push(task.await.unwrap());
        }
        (transcripts, metrics.encode())
    }
}

async fn answer(base: BaseHandle, request: GenerateRequest) -> Transcript {
    let worker =
        RewardWorker { member: MemberId("reward".into()), generation: Generation(1), address: String::new() };
    let placements = request.guidance.iter().map(|_| vec![worker.clone()]).collect();
    let placed =
        Placed { request, progress: Progress::default(), placements, generation: Generation(1), tenant: 0 };
    let mut events = base.run(placed, None).await.unwrap();
    let mut transcript = Transcript::default();
    while let Some(event) = events.recv().await {
        transcript.apply(&event.unwrap()).unwrap();
    }
    assert!(transcript.summary.is_some(), "the stream ended early");
    transcript
}

/// Every sampler setting, up to three terms beside the base model at several strengths, short and long answers.
fn requests(random: &mut StdRng) -> Vec<GenerateRequest> {
    (0..REQUESTS)
        .map(|index| {
            let prompt = (0..random.random_range(1..60)).map(|_| random.random_range(1..VOCABULARY as u32));
            let term = |reward: &str, strength| GuidanceTerm {
                reward: reward.into(),
                preference: Vec::new(),
                strength,
            };
            let guidance = match index % 6 {
                0 => vec![],
                1 | 2 => vec![term(PLAIN, 1.0)],
                3 => vec![term(PROMPTED, 0.8)],
                4 => vec![term(PROMPTED, 0.3), term(PLAIN, 0.9)],
                _ => vec![term(PLAIN, 0.7), term(PROMPTED, 0.5), term(PLAIN, -0.2)],
            };
            GenerateRequest {
                request_id: format!("request-{index}"),
                model: String::new(),
                input: Input::Tokens(prompt.collect()),
                sampling: Sampling {
                    temperature: [0.0, 0.7, 1.0][index % 3],
                    top_k: if index % 5 == 1 { 20 } else { 0 },
                    top_p: if index % 4 == 1 { 0.9 } else { 1.0 },
                    min_p: if index % 7 == 3 { 0.05 } else { 0.0 },
                    repetition_penalty: if index % 5 == 2 { 1.3 } else { 1.0 },
                    frequency_penalty: if index % 5 == 4 { 0.4 } else { 0.0 },
                    seed: Some(random.random()),
                    max_tokens: random.random_range(1..80),
                    stop: if index % 8 == 5 { vec!["t77".into()] } else { Vec::new() },
                    stop_token_ids: if index % 8 == 6 { vec![3, 5, 8] } else { Vec::new() },
                    logprobs: if index % 9 == 4 { Some(2) } else { None },
                    n: if index % 10 == 7 { 3 } else { 1 },
                    ignore_eos: index % 2 == 0,
                    ..Sampling::default()
                },
                base_strength: if index % 6 == 0 { 1.0 } else { [1.0, 1.0, 0.0, 0.5, 2.0][index / 6 % 5] },
                guidance,
                on_reward_loss: OnRewardLoss::Wait,
                priority: Priority::Normal,
                exchange: if index % 11 == 10 { Some(Exchange::Dense) } else { None },
                skip: 0,
                audit: false,
            }
        })
        .collect()
}

/// Everything that a client sees but times and bytes.
fn seen(transcripts: &[Transcript]) -> Vec<impl PartialEq + std::fmt::Debug> {
    transcripts.iter().map(|transcript| transcript.choices.clone()).collect()
}

fn speculation(transcripts: &[Transcript]) -> pb::Speculation {
    transcripts.iter().filter_map(|transcript| transcript.summary.as_ref()?.speculation).fold(
        pb::Speculation::default(),
        |sum, own| pb::Speculation {
            base_passes: sum.base_passes + own.base_passes,
            drafted: sum.drafted + own.drafted,
            accepted: sum.accepted + own.accepted,
        },
    )
}

fn pace(window: u32, rows: DraftRows) -> PaceOptions {
    PaceOptions { window: DraftWindow::Fixed(window), rows }
}

const SCENE: Scene = Scene {
    agreement: 0.8,
    twins: false,
    blocks: 4096,
    step_tokens: 512,
    list_length: 12,
    lists: None,
    base_step: Duration::ZERO,
    pace: PaceOptions { window: DraftWindow::Fixed(6), rows: DraftRows::Single },
    chaos: Chaos::NONE,
};

/// A failing seed prints, and can be run alone: UNIARM_SEED=n.
#[tokio::test(flavor = "multi_thread")]
async fn any_pace_over_any_link_gives_the_tokens_of_lock_step() {
    let seeds = match std::env::var("UNIARM_SEED") {
        Ok(seed) => seed.parse().map(|seed| seed..seed + 1).unwrap(),
        Err(_) => 0..24_u64,
    };
    for seed in seeds {
        let mut random = StdRng::seed_from_u64(seed);
        let windows = [0, 1, 2, 5, 16, 64];
        let window = match random.random_range(0..windows.len() + 1) {
            index if index < windows.len() => DraftWindow::Fixed(windows[index]),
            _ => DraftWindow::Auto,
        };
        let rows = [DraftRows::Auto, DraftRows::Single, DraftRows::Dual][random.random_range(0..3)];
        let scene = Scene {
            agreement: [0.0, 0.5, 0.8, 0.95, 1.0][random.random_range(0..5)],
            twins: random.random(),
            blocks: [40, 120, 4096][random.random_range(0..3)],
            step_tokens: [16, 64, 512][random.random_range(0..3)],
            lists: [None, Some(0), Some(5), Some(256)][random.random_range(0..4)],
            pace: PaceOptions { window, rows },
            chaos: Chaos::drawn(&mut random),
            ..SCENE
        };
        let requests = requests(&mut random);
        let expected = scene.reference().answers(&requests).await;
        let found = scene.answers(&requests).await;
        for ((found, expected), request) in seen(&found).iter().zip(seen(&expected)).zip(&requests) {
            assert_eq!(*found, expected, "seed {seed}: {scene:?}\n{request:?}");
        }
    }
}

/// In lock-step, where reward workers have a use for lists too: kept rows, a few of them, and none.
#[tokio::test(flavor = "multi_thread")]
async fn models_that_give_lists_choose_the_tokens_of_whole_rows() {
    for (seed, kept) in [(100, 256), (101, 5), (102, 0)] {
        for list_length in [1, 3, 12] {
            let scene = Scene { lists: Some(kept), list_length, pace: pace(0, DraftRows::Auto), ..SCENE };
            let requests = requests(&mut StdRng::seed_from_u64(seed));
            let expected = scene.reference().answers(&requests).await;
            let (found, metrics) = scene.counted(&requests).await;
            assert_eq!(seen(&found), seen(&expected), "{scene:?}");
            let count = |name: &str| {
                let line =
                    metrics.lines().find_map(|line| line.strip_prefix(&format!("uniarm_reward_{name} ")));
                line.unwrap().parse::<u64>().unwrap()
            };
            assert!(count("positions_total{form=\"list\"}") > 100, "{metrics}");
            // Filters, penalties and short lists: base workers ask for more of many rows.
            let ways = ["fetched", "repeated"];
            let [fetched, repeated] =
                ways.map(|way| count(&format!("undecided_lists_total{{way=\"{way}\"}}")));
            println!(
                "{kept} kept, lists of {list_length}: {fetched} rows fetched, {repeated} computed again"
            );
            assert_eq!((fetched > 0, repeated > 0), (kept > 0, kept < 256), "{metrics}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reward_that_agrees_spares_the_base_model_most_of_its_passes() {
    let requests: Vec<_> = requests(&mut StdRng::seed_from_u64(5))
        .into_iter()
        .filter(|request| request.guidance.len() == 1 && request.exchange.is_none())
        .collect();
    let tokens = |transcripts: &[Transcript]| -> u32 {
        transcripts.iter().filter_map(|t| Some(t.summary.as_ref()?.usage?.completion_tokens)).sum()
    };
    let lock_step = SCENE.reference().answers(&requests).await;
    assert_eq!(speculation(&lock_step).base_passes, tokens(&lock_step), "a pass for each token");
    assert_eq!(speculation(&lock_step).drafted, 0);

    // Two rows of one model know all of the guided logit: no draft is wrong.
    let twins = Scene { twins: true, pace: pace(8, DraftRows::Dual), ..SCENE };
    let drafted = twins.answers(&requests).await;
    let Speculated { share, passes } = Speculated::of(&drafted, tokens(&drafted));
    assert!(share > 0.99, "{share} of the drafts of two rows of one model were right");
    assert!(passes < 0.4, "{passes} passes for each token");

    // One row of a model that mostly agrees.
    let drafted = Scene { agreement: 0.97, ..SCENE }.answers(&requests).await;
    let Speculated { share, passes } = Speculated::of(&drafted, tokens(&drafted));
    assert!(share < 0.99 && passes < 0.8, "{share} right, {passes} passes for each token");
}

/// Lists of one token: whenever base and reward model disagree the base worker asks for more of the row, and drafts of what
/// follows are there before the answer.
#[tokio::test(flavor = "multi_thread")]
async fn no_pass_is_spent_on_what_follows_a_token_in_question() {
    let term = GuidanceTerm { reward: PLAIN.into(), preference: Vec::new(), strength: 1.0 };
    let request = |seed| GenerateRequest {
        sampling: Sampling {
            temperature: 0.0,
            seed: Some(seed),
            max_tokens: 160,
            ignore_eos: true,
            ..Sampling::default()
        },
        guidance: vec![term.clone()],
        ..requests(&mut StdRng::seed_from_u64(seed)).swap_remove(1)
    };
    let (window, gather) = (8, 4);
    let pace = pace(window, DraftRows::Single);
    let scene = Scene { list_length: 1, base_step: Duration::from_millis(8), pace, ..SCENE };
    for agreement in [0.9, 0.97] {
        // One after the other: beside others, an answer finds its whole window drafted whenever its turn comes.
        let mut drafted = Vec::new();
        for seed in 0..3 {
            drafted.extend(Scene { agreement, ..scene }.answers(&[request(seed)]).await);
        }
        let Speculated { share, passes } = Speculated::of(&drafted, 3 * 160);
        let arithmetic = (1.0 - share) / (1.0 - share.powi(gather));
        println!(
            "{share:.3} of the drafts right, {passes:.3} passes for each token, by arithmetic {arithmetic:.3}"
        );
        assert!(share < 0.95, "{share} of the drafts were right: nothing was in question");
        assert!(passes < 1.1 * arithmetic, "{passes} passes for each token, by arithmetic {arithmetic}");
    }
}

struct Speculated {
    share: f64,
    passes: f64,
}

impl Speculated {
    fn of(transcripts: &[Transcript], tokens: u32) -> Self {
        let pb::Speculation { base_passes, drafted, accepted } = speculation(transcripts);
        Self {
            share: f64::from(accepted) / f64::from(drafted),
            passes: f64::from(base_passes) / f64::from(tokens),
        }
    }
}
