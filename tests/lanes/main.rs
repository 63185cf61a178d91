//! Whole rows from GPU to GPU, from the request to the answer: a base and a reward engine over gRPC, each with a model on a GPU, answer
//! as they do without a lane, whatever becomes of it.
//!
//! No GPU is here: the program builds the libcuda and the libnccl that crates/cuda is tested with, and starts itself again where the
//! loader finds them. That NCCL connects threads of one process, so both workers are here.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

#[allow(dead_code)] // its adapters are for other tests
#[path = "../../crates/cuda/tests/support/made_up.rs"]
mod made_up;

use std::{
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use made_up::{LLAMA, Scene, Shape, VOCABULARY};
use uniarm_base::{
    BaseEngine, BaseHandle, BaseOptions, BaseSettings, DraftRows, DraftWindow, GrpcScorer, Lanes, PaceOptions,
};
use uniarm_cuda::{CudaLanes, CudaLlama, CudaOptions, WeightFormat};
use uniarm_model::{DeviceRow, Hangup, ModelError, RowLanes, RowReceiver, RowSender, ScriptedForward};
use uniarm_proto::{
    Exchange, GenerateRequest, Generation, GuidanceTerm, Input, Member, MemberId, OnRewardLoss, Placed,
    Priority, Progress, RewardWorker, Role, Sampling, Transcript,
};
use uniarm_reward::{Backbone, RewardCatalogue, RewardEngine, RewardOptions, server::RewardService};
use uniarm_runtime::{
    Metrics, Readiness, Shutdown,
    grpc::{GrpcOptions, GrpcServer},
};

/// Set in the process that finds the libraries.
const FAKE: &str = "UNIARM_TEST_LANES";

/// Exit status of the script where there is no compiler.
const NO_COMPILER: i32 = 3;

/// Long enough for a machine that is in use besides.
const TIMEOUT: Duration = Duration::from_secs(120);

const CONTEXT_TOKENS: usize = 512;

/// Two models with heads of their own, so that a token is not what the one before it was: logits of a tied head would leave
/// rewards nothing to say.
const BASE: Shape = Shape { qwen2: true, ..LLAMA };
const REWARD: Shape = Shape { hidden: 96, ..BASE };

/// The reward model that is its backbone as it is, and one under a system text.
const PLAIN: &str = "plain";
const PROMPTED: &str = "prompted";

fn main() {
    if std::env::var_os(FAKE).is_none() {
        return again();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        answers_are_those_without_a_lane().await;
        println!("ok      answers are those without a lane");
        rows_that_do_not_go_over_the_lane_stand_beside_those_that_do().await;
        println!("ok      rows that do not go over the lane stand beside those that do");
        a_lane_that_breaks_in_an_answer_changes_nothing_of_it().await;
        println!("ok      a lane that breaks in an answer changes nothing of it");
        where_one_end_has_no_lane_rows_come_by_grpc().await;
        println!("ok      where one end has no lane rows come by grpc");
    });
}

/// This program, where the loader finds the stand-ins.
fn again() {
    let folder = tempfile::tempdir().unwrap();
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let script = repository.join("crates/cuda/tests/fake/build.sh");
    let output = Command::new("sh").arg(script).arg(folder.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(NO_COMPILER) {
        return println!("skipped: lanes of rows: {}", said.trim());
    }
    assert!(output.status.success(), "{said}");
    let mut command = Command::new(std::env::current_exe().unwrap());
    let status = command.env("LD_LIBRARY_PATH", folder.path()).env(FAKE, "1").status().unwrap();
    if !status.success() {
        println!("FAILED  {status}");
        std::process::exit(1);
    }
}

/// Which ends of a lane there are, and what becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lane {
    None,
    Whole,
    OfBaseAlone,
    OfRewardAlone,
    /// The end that receives hangs up at its call of this number.
    ReceiverBreaks(usize),
    /// The end that sends fails there, and the rows of that call are lost.
    SenderBreaks(usize),
}

/// A base and a reward worker that has an address.
struct Pair {
    base: BaseHandle,
    worker: RewardWorker,
    of_base: Metrics,
    of_reward: Metrics,
    /// Lanes made so far, by the end that receives.
    made: Arc<AtomicUsize>,
    shutdown: Shutdown,
    _scenes: [Scene; 2],
}

/// Lanes whose ends break.
#[derive(Debug)]
struct Fragile {
    lanes: CudaLanes,
    lane: Lane,
    made: Arc<AtomicUsize>,
}

struct Breaking<E> {
    end: E,
    /// Calls until it breaks.
    left: Option<usize>,
}

impl Pair {
    async fn new(lane: Lane, exchange: Exchange, window: DraftWindow) -> Self {
        let (of_base, of_reward, made) = (Metrics::new(), Metrics::new(), Arc::default());
        let lanes = || -> Arc<dyn RowLanes> {
            Arc::new(Fragile { lanes: CudaLanes::new(0, TIMEOUT), lane, made: Arc::clone(&made) })
        };
        let [base_scene, reward_scene] = [BASE, REWARD].map(Shape::scene);
        let mut catalogue = RewardCatalogue::new(Backbone {
            name: "reward".into(),
            fingerprint: [2; 32],
            tokenizer: ScriptedForward::tokenizer(VOCABULARY),
            template: None,
            context_tokens: CONTEXT_TOKENS,
            vocabulary: VOCABULARY,
        });
        catalogue.add_plain(PLAIN).unwrap();
        catalogue.add_prompted(PROMPTED, "t7 t8 t9").unwrap();
        let has_lanes = !matches!(lane, Lane::None | Lane::OfBaseAlone);
        let options = RewardOptions { lanes: has_lanes.then(lanes), ..RewardOptions::default() };
        let reward = RewardEngine::start(model(&reward_scene), catalogue, &options, &of_reward).unwrap();

        let server =
            GrpcServer::bind("127.0.0.1:0", GrpcOptions::default(), Readiness::starting()).await.unwrap();
        let worker = RewardWorker {
            member: MemberId("reward".into()),
            generation: Generation(1),
            address: server.local_addr().to_string(),
        };
        let member = Member {
            id: worker.member.clone(),
            generation: worker.generation,
            address: worker.address.clone(),
            ..Member::new(Role::Reward)
        };
        let service = RewardService::new(reward, member);
        let shutdown = Shutdown::new();
        tokio::spawn(server.add_service(service.reward_server()).serve(shutdown.clone()));

        let settings = BaseSettings {
            model: "base".into(),
            fingerprint: [1; 32],
            tokenizer: ScriptedForward::tokenizer(VOCABULARY),
            template: None,
            context_tokens: CONTEXT_TOKENS,
            vocabulary: VOCABULARY,
            exchange,
            list_length: 2,
        };
        let has_lanes = !matches!(lane, Lane::None | Lane::OfRewardAlone);
        let lanes = has_lanes.then(|| Lanes::new(lanes(), &of_base));
        let scorer = Arc::new(GrpcScorer { lanes, ..GrpcScorer::default() });
        let pace = PaceOptions { window, rows: DraftRows::Auto };
        let options = BaseOptions { pace, ..BaseOptions::default() };
        let base = BaseEngine::start(model(&base_scene), settings, scorer, &options, &of_base).unwrap();
        Self { base, worker, of_base, of_reward, made, shutdown, _scenes: [base_scene, reward_scene] }
    }

    async fn answers(&self, requests: &[GenerateRequest]) -> Vec<Transcript> {
        let answer = |request: &GenerateRequest| {
            let placements = request.guidance.iter().map(|_| vec![self.worker.clone()]).collect();
            let placed = Placed {
                request: request.clone(),
                progress: Progress::default(),
                placements,
                generation: Generation(1),
                tenant: 0,
            };
            let base = self.base.clone();
            tokio::spawn(async move {
                let mut events = base.run(placed, None).await.unwrap();
                let mut transcript = Transcript::default();
                while let Some(event) = events.recv().await {
                    transcript.apply(&event.unwrap()).unwrap();
                }
                assert!(transcript.summary.is_some(), "the stream ended early");
                transcript
            })
        };
        let tasks: Vec<_> = requests.iter().map(answer).collect();
        let mut transcripts = Vec::new();
        for task in tasks {
            let answered = tokio::time::timeout(TIMEOUT, task).await;
            transcripts.push(answered.expect("an answer in time").unwrap());
        }
        transcripts
    }

    /// Answers a short request until rows come over the lane: it has two terms, of which one alone may draft.
    async fn until_there_is_a_lane(&self) {
        let began = Instant::now();
        while self.lane_rows() == 0 {
            assert!(began.elapsed() < TIMEOUT, "no row comes over a lane");
            self.answers(&[request(2, Some(Exchange::Dense))]).await;
        }
    }

    fn lane_rows(&self) -> u64 {
        count(&self.of_base, "uniarm_base_lane_rows_total")
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.shutdown.begin();
    }
}

fn model(scene: &Scene) -> Box<CudaLlama> {
    let options =
        CudaOptions { device: 0, kv_blocks: 128, block_tokens: 16, weights: WeightFormat::F32, graphs: true };
    Box::new(CudaLlama::load(&scene.files, &options).unwrap())
}

/// A counter without labels.
fn count(metrics: &Metrics, name: &str) -> u64 {
    let page = metrics.encode();
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map_or(0, |value| value.parse().unwrap())
}

fn seen(transcripts: &[Transcript]) -> Vec<impl PartialEq + std::fmt::Debug + use<>> {
    transcripts.iter().map(|transcript| transcript.choices.clone()).collect()
}

/// One or two terms, some of negative strength; every third answer is greedy. Lists of two tokens decide little under filters.
fn request(index: u32, exchange: Option<Exchange>) -> GenerateRequest {
    let term =
        |reward: &str, strength| GuidanceTerm { reward: reward.into(), preference: Vec::new(), strength };
    let guidance = match index % 4 {
        0 => vec![term(PLAIN, 1.0)],
        1 => vec![term(PROMPTED, 0.8)],
        2 => vec![term(PROMPTED, 0.3), term(PLAIN, 0.9)],
        _ => vec![term(PLAIN, 0.7), term(PROMPTED, -0.4)],
    };
    GenerateRequest {
        request_id: format!("request-{index}"),
        model: String::new(),
        input: Input::Tokens(
            (1..3 + index % 4).map(|token| (token * 37 + index) % VOCABULARY as u32).collect(),
        ),
        sampling: Sampling {
            temperature: [0.0, 0.7, 1.3][index as usize % 3],
            top_p: if index % 4 == 1 { 0.95 } else { 1.0 },
            top_k: if index % 5 == 2 { 30 } else { 0 },
            seed: Some(u64::from(index) << 7),
            max_tokens: 6 + 2 * (index % 7),
            n: if index % 6 == 5 { 3 } else { 1 },
            ignore_eos: true,
            ..Sampling::default()
        },
        base_strength: 1.0,
        guidance,
        on_reward_loss: OnRewardLoss::Wait,
        priority: Priority::Normal,
        exchange,
        skip: 0,
        audit: false,
    }
}

fn requests(exchange: Option<Exchange>) -> Vec<GenerateRequest> {
    (0..9).map(|index| request(index, exchange)).collect()
}

/// Tokens that all of these have.
fn tokens(transcripts: &[Transcript]) -> usize {
    transcripts.iter().flat_map(|transcript| &transcript.choices).map(|choice| choice.tokens.len()).sum()
}

async fn answers_are_those_without_a_lane() {
    let lock_step = DraftWindow::Fixed(0);
    let reference = Pair::new(Lane::None, Exchange::Certified, lock_step).await;
    let expected = reference.answers(&requests(None)).await;
    assert_eq!(reference.lane_rows(), 0);
    // Otherwise no wrong row would show.
    let unguided = |request| GenerateRequest { guidance: Vec::new(), ..request };
    let unguided: Vec<_> = requests(None).into_iter().map(unguided).collect();
    let alone = reference.answers(&unguided).await;
    assert!(alone.iter().zip(&expected).all(|(alone, guided)| alone.choices != guided.choices));

    let pair = Pair::new(Lane::Whole, Exchange::Dense, lock_step).await;
    pair.until_there_is_a_lane().await;
    let before = pair.lane_rows();
    let found = pair.answers(&requests(None)).await;
    assert_eq!(seen(&found), seen(&expected));
    // In lock-step each term has a row for each token; the last terms of a step may find the lane full.
    let rows = pair.lane_rows() - before;
    assert!(rows as usize >= tokens(&found), "{rows} rows of {} tokens", tokens(&found));
    let bytes = count(&pair.of_base, "uniarm_base_lane_bytes_total");
    assert_eq!(bytes, pair.lane_rows() * (4 * VOCABULARY) as u64);
    assert_eq!(count(&pair.of_reward, "uniarm_reward_lane_rows_total"), pair.lane_rows());
    assert_eq!(pair.made.load(Ordering::Relaxed), 1);

    // Rows that are asked for after their lists.
    let before = pair.lane_rows();
    let certified = pair.answers(&requests(Some(Exchange::Certified))).await;
    assert_eq!(seen(&certified), seen(&expected));
    assert!(pair.lane_rows() > before, "no list was followed by its row");
}

/// Sessions that draft, and answers with details, beside others whose rows go over the lane.
async fn rows_that_do_not_go_over_the_lane_stand_beside_those_that_do() {
    let detailed = |mut request: GenerateRequest| {
        request.sampling.logprobs = Some(3);
        request
    };
    let asked: Vec<_> = requests(None).into_iter().step_by(2).map(detailed).chain(requests(None)).collect();
    let reference = Pair::new(Lane::None, Exchange::Certified, DraftWindow::Fixed(0)).await;
    let expected = reference.answers(&asked).await;
    for window in [0, 4] {
        let pair = Pair::new(Lane::Whole, Exchange::Dense, DraftWindow::Fixed(window)).await;
        pair.until_there_is_a_lane().await;
        let before = pair.lane_rows();
        assert_eq!(seen(&pair.answers(&asked).await), seen(&expected), "window {window}");
        assert!(pair.lane_rows() > before, "window {window}: no row went over the lane");
    }
}

async fn a_lane_that_breaks_in_an_answer_changes_nothing_of_it() {
    let lock_step = DraftWindow::Fixed(0);
    let expected = Pair::new(Lane::None, Exchange::Dense, lock_step).await.answers(&requests(None)).await;
    for lane in
        [Lane::ReceiverBreaks(1), Lane::ReceiverBreaks(9), Lane::SenderBreaks(1), Lane::SenderBreaks(9)]
    {
        let pair = Pair::new(lane, Exchange::Dense, lock_step).await;
        let began = Instant::now();
        // The lane comes while they run.
        while count(&pair.of_base, "uniarm_base_reward_losses_total") == 0 {
            assert!(began.elapsed() < TIMEOUT, "{lane:?}: the lane does not break");
            let found = pair.answers(&requests(None)).await;
            assert_eq!(seen(&found), seen(&expected), "{lane:?}");
        }
        // Nobody waited for the timeout; and the worker is left alone with lanes for a while.
        assert!(began.elapsed() < TIMEOUT / 2, "{lane:?}: {:?}", began.elapsed());
        let rows = pair.lane_rows();
        let found = pair.answers(&requests(None)).await;
        assert_eq!(seen(&found), seen(&expected), "{lane:?}");
        assert_eq!((pair.lane_rows(), pair.made.load(Ordering::Relaxed)), (rows, 1), "{lane:?}");
    }
}

async fn where_one_end_has_no_lane_rows_come_by_grpc() {
    let lock_step = DraftWindow::Fixed(0);
    let expected = Pair::new(Lane::None, Exchange::Dense, lock_step).await.answers(&requests(None)).await;
    for lane in [Lane::OfBaseAlone, Lane::OfRewardAlone] {
        let pair = Pair::new(lane, Exchange::Dense, lock_step).await;
        for _ in 0..2 {
            let found = pair.answers(&requests(None)).await;
            assert_eq!(seen(&found), seen(&expected), "{lane:?}");
        }
        assert_eq!(pair.lane_rows(), 0, "{lane:?}");
        assert_eq!(count(&pair.of_base, "uniarm_base_reward_losses_total"), 0, "{lane:?}");
    }
}

// === impl Fragile ===

impl RowLanes for Fragile {
    fn offer(&self) -> Result<Vec<u8>, ModelError> {
        self.made.fetch_add(1, Ordering::Relaxed);
        self.lanes.offer()
    }

    fn receiver(&self, offer: &[u8]) -> Result<Box<dyn RowReceiver>, ModelError> {
        let left = if let Lane::ReceiverBreaks(calls) = self.lane { Some(calls) } else { None };
        Ok(Box::new(Breaking { end: self.lanes.receiver(offer)?, left }))
    }

    fn sender(&self, offer: &[u8]) -> Result<Box<dyn RowSender>, ModelError> {
        let left = if let Lane::SenderBreaks(calls) = self.lane { Some(calls) } else { None };
        Ok(Box::new(Breaking { end: self.lanes.sender(offer)?, left }))
    }
}

// === impl Breaking ===

impl<E> Breaking<E> {
    /// Whether it breaks at this call.
    fn breaks(&mut self) -> bool {
        let breaks = self.left == Some(0);
        self.left = self.left.and_then(|left| left.checked_sub(1));
        breaks
    }
}

impl RowReceiver for Breaking<Box<dyn RowReceiver>> {
    fn receive(&mut self, lengths: &[usize]) -> Result<Vec<Vec<f32>>, ModelError> {
        if self.breaks() {
            self.end.hangup().close();
        }
        self.end.receive(lengths)
    }

    fn hangup(&self) -> Hangup {
        self.end.hangup()
    }
}

impl RowSender for Breaking<Box<dyn RowSender>> {
    fn send(&mut self, rows: Vec<(DeviceRow, usize)>) -> Result<(), ModelError> {
        if self.breaks() {
            return Err(ModelError::Device("it fell off the bus".to_owned()));
        }
        self.end.send(rows)
    }

    fn hangup(&self) -> Hangup {
        self.end.hangup()
    }
}
