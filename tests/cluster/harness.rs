//! Starts clusters of real processes and asks them.

use std::{
    ffi::OsStr,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tonic::{Request, Status, transport::Channel};
use uniarm_cluster::testing::free_port;
use uniarm_proto::{
    ChatMessage, GenerateRequest, GuidanceTerm, Input, OnRewardLoss, Priority, Sampling, Transcript, client,
    pb::{self, inference_client::InferenceClient},
};

/// Loading a model on a busy machine.
const READY_TIMEOUT: Duration = Duration::from_secs(120);

/// Of caches whose size a test does not name. Their memory is taken at the start, and on some virtual machines by seconds.
pub const KV_TOKENS: &str = "4096";

/// The two prompted reward models that most tests steer with.
pub const PROMPTED: [&str; 4] = [
    "--prompted",
    "positive=You are an extremely cheerful, positive and encouraging AI assistant. Answer in very simple words.",
    "--prompted",
    "concise=Answer in one short sentence. Be as brief as possible.",
];

/// Where a process runs: on this machine, or in a network namespace with an address of its own.
#[derive(Debug, Clone)]
pub struct Host {
    /// None: the one that this thread is in.
    pub namespace: Option<String>,
    /// Where programs find libraries first.
    pub libraries: Option<PathBuf>,
    pub address: String,
}

/// A process of `uniarm`, killed when it is dropped.
pub struct Running {
    child: Child,
    host: Host,
    role: String,
    flags: Vec<String>,
    pub address: String,
    /// Of /metrics, where asked for.
    pub admin: String,
}

/// Processes that make a cluster.
pub struct Cluster {
    pub router: Running,
    pub workers: Vec<Running>,
    /// `host:port` of the HTTP front door; empty where there is none.
    pub http: String,
}

/// Tests whose models compute take turns: two cores and a few gigabytes are shared.
pub fn machine() -> MutexGuard<'static, ()> {
    static MACHINE: Mutex<()> = Mutex::new(());
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap()
}

/// Path of the demo model: from the environment, or fetched into the cache.
pub fn demo_model() -> &'static str {
    static MODEL: OnceLock<String> = OnceLock::new();
    MODEL.get_or_init(|| {
        let output =
            Command::new("bash").arg(repository().join("scripts/fetch-demo-model.sh")).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    })
}

/// Recorded values that only the project's own machines have.
pub fn shared(path: &str) -> Option<PathBuf> {
    let root =
        std::env::var_os("UNIARM_SHARED").map_or_else(|| repository().join("../shared"), PathBuf::from);
    let path = root.join(path);
    if !path.exists() {
        println!("skipped: {} is not here", path.file_name().unwrap().display());
        return None;
    }
    Some(path)
}

pub fn free_address() -> String {
    Host::this().free_address()
}

// === impl Host ===

impl Host {
    pub fn this() -> Self {
        Self { namespace: None, libraries: None, address: "127.0.0.1".to_owned() }
    }

    /// This machine, where programs find the libraries of a folder first.
    pub fn with_libraries(folder: &Path) -> Self {
        Self { libraries: Some(folder.to_owned()), ..Self::this() }
    }

    pub fn free_address(&self) -> String {
        format!("{}:{}", self.address, free_port())
    }

    /// A program that will run there, in a process of its own id.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = match &self.namespace {
            None => Command::new(program),
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace]).arg(program);
                command
            }
        };
        if let Some(libraries) = &self.libraries {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        command.env("UNIARM_KV_TOKENS", KV_TOKENS);
        command
    }
}

// === impl Running ===

impl Running {
    /// Starts a role and waits until it is ready.
    pub fn start(role: &str, flags: &[&str]) -> Self {
        Self::start_on(&Host::this(), role, flags)
    }

    pub fn start_on(host: &Host, role: &str, flags: &[&str]) -> Self {
        let admin = host.free_address();
        let mut child = host
            .command(env!("CARGO_BIN_EXE_uniarm"))
            .arg(role)
            .args(flags)
            .args(["--admin", &admin, "--log-filter", "warn"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().unwrap();
        let (sender, ready) = std::sync::mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Some((_, url)) = line.split_once(" is ready at ")
                    && let Some((_, rest)) = url.split_once("://")
                {
                    let address = rest.split([':', ' ']).take(2).collect::<Vec<_>>().join(":");
                    let _ = sender.send(address);
                } else if line.ends_with(" is ready") {
                    // A rank that computes for its leader: nobody calls it.
                    let _ = sender.send(String::new());
                }
            }
        });
        let address =
            ready.recv_timeout(READY_TIMEOUT).unwrap_or_else(|_| panic!("{role} {flags:?} is not ready"));
        let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        Self { child, host: host.clone(), role: role.to_owned(), flags, address, admin }
    }

    /// Starts it again after its end, with the same flags.
    pub fn restart(&mut self) {
        let flags: Vec<&str> = self.flags.iter().map(String::as_str).collect();
        *self = Self::start_on(&self.host, &self.role, &flags);
    }

    /// Of the process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn role(&self) -> &str {
        &self.role
    }

    /// SIGTERM, SIGSTOP, SIGCONT, …
    pub fn signal(&self, signal: libc::c_int) {
        // SAFETY: kill(2) takes plain numbers; the child has not been waited for, so its id is still its own.
        unsafe { libc::kill(self.child.id() as libc::pid_t, signal) };
    }

    /// SIGTERM, and a wait for its own end.
    pub fn terminate(&mut self) {
        self.signal(libc::SIGTERM);
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{} ended with {status}", self.role);
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// A sample of /metrics, summed over its labels.
    pub fn metric(&self, name: &str) -> f64 {
        let page = http_get(&self.admin, "/metrics");
        let samples = page
            .lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])));
        samples.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The plainest HTTP client.
pub fn http_get(address: &str, path: &str) -> String {
    http_get_as(address, path, "")
}

/// `header`: none, or a line with its end.
pub fn http_get_as(address: &str, path: &str, header: &str) -> String {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n{header}\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

// === impl Cluster ===

impl Cluster {
    /// Everything in one process.
    pub fn up(flags: &[&str]) -> Self {
        let http = free_address();
        let flags =
            [&["--base", demo_model(), "--grpc", "127.0.0.1:0", "--http-listen", &http], flags].concat();
        Self { router: Running::start("up", &flags), workers: Vec::new(), http }
    }

    /// Router, base and reward as processes of their own that know each other's addresses.
    pub fn three_processes(base_flags: &[&str], reward_flags: &[&str]) -> Self {
        let (base, reward) = thread::scope(|scope| {
            let base = scope.spawn(|| worker("base", base_flags));
            let reward = scope.spawn(|| worker("reward", reward_flags));
            (base.join().unwrap(), reward.join().unwrap())
        });
        let http = free_address();
        let flags = ["--base-peer", &base.address, "--reward-peer", &reward.address, "--http-listen", &http];
        Self { router: Running::start("router", &flags), workers: vec![base, reward], http }
    }

    /// A router, and one process that is base and reward worker over one copy of the weights.
    pub fn fused_processes(reward_flags: &[&str]) -> Self {
        let reward = free_address();
        let base = worker("base", &[&["--fused-reward", &reward], reward_flags].concat());
        let peers = ["--base-peer", &base.address, "--reward-peer", &reward];
        Self { router: Running::start("router", &peers), workers: vec![base], http: String::new() }
    }

    /// As three processes, with a base worker that is `size` processes itself.
    pub fn sharded(size: usize, reward_flags: &[&str]) -> Self {
        let meeting = free_address();
        let (mut workers, reward) = thread::scope(|scope| {
            let ranks = ranks(size, &["--group-address", &meeting]);
            let ranks: Vec<_> = ranks
                .into_iter()
                .map(|flags| scope.spawn(move || worker("base", &borrowed(&flags))))
                .collect();
            let reward = scope.spawn(|| worker("reward", reward_flags));
            (ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>(), reward.join().unwrap())
        });
        let router = ["--base-peer", &workers[0].address, "--reward-peer", &reward.address];
        let router = Running::start("router", &router);
        workers.insert(1, reward);
        Self { router, workers, http: String::new() }
    }

    /// Router, base and reward as processes that meet through a store.
    pub fn through_store(store: &str, base_flags: &[&str], reward_flags: &[&str]) -> Self {
        let store = ["--store", store];
        let (base, reward) = thread::scope(|scope| {
            let base = scope.spawn(|| worker("base", &[&store, base_flags].concat()));
            let reward = scope.spawn(|| worker("reward", &[&store, reward_flags].concat()));
            (base.join().unwrap(), reward.join().unwrap())
        });
        let http = String::new();
        Self { router: Running::start("router", &store), workers: vec![base, reward], http }
    }

    /// Of metrics of the base worker, wherever it runs.
    pub fn base(&self) -> &Running {
        self.workers.first().unwrap_or(&self.router)
    }

    pub fn reward(&self) -> &Running {
        self.workers.get(1).unwrap_or(&self.router)
    }

    pub async fn channel(&self) -> Channel {
        dial(&self.router.address).await
    }

    /// A client of a cluster whose router knows its workers.
    pub async fn client(&self) -> InferenceClient<Channel> {
        knows_its_workers(&self.router.address).await
    }
}

async fn dial(address: &str) -> Channel {
    client::endpoint(address).unwrap().connect().await.unwrap()
}

/// A client of a router, once it knows its workers: it finds them a moment after its own start.
pub async fn knows_its_workers(router: &str) -> InferenceClient<Channel> {
    let mut inference = client::inference(dial(router).await);
    let began = Instant::now();
    loop {
        let served = inference.list_models(pb::ListModelsRequest {}).await.unwrap().into_inner();
        if !served.base_models.is_empty() && !served.reward_models.is_empty() {
            return inference;
        }
        assert!(began.elapsed() < READY_TIMEOUT, "the router finds no workers");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Flags of each rank of a group.
pub fn ranks(size: usize, flags: &[&str]) -> Vec<Vec<String>> {
    let of = |rank: usize| {
        let (rank, size) = (rank.to_string(), size.to_string());
        let group = ["--group", "g0", "--rank", &rank, "--size", &size, "--threads", "1"];
        [&group, flags].concat().into_iter().map(str::to_owned).collect()
    };
    (0..size).map(of).collect()
}

pub fn borrowed(flags: &[String]) -> Vec<&str> {
    flags.iter().map(String::as_str).collect()
}

pub fn worker(role: &str, flags: &[&str]) -> Running {
    Running::start(role, &[&["--model", demo_model()], flags].concat())
}

// === requests ===

pub fn request(prompt: &str, preference: &[(&str, f32)]) -> GenerateRequest {
    let preference: Vec<_> = preference.iter().map(|(name, weight)| ((*name).to_owned(), *weight)).collect();
    let term = GuidanceTerm { reward: String::new(), preference, strength: 1.0 };
    let message = ChatMessage { role: "user".into(), content: prompt.into() };
    GenerateRequest {
        request_id: String::new(),
        model: String::new(),
        input: Input::Chat(vec![message]),
        sampling: Sampling { temperature: 0.0, seed: Some(7), max_tokens: 16, ..Sampling::default() },
        guidance: if term.preference.is_empty() { Vec::new() } else { vec![term] },
        base_strength: 1.0,
        on_reward_loss: OnRewardLoss::Wait,
        priority: Priority::Normal,
        exchange: None,
        skip: 0,
        audit: false,
    }
}

pub async fn ask(
    inference: &mut InferenceClient<Channel>,
    request: impl Into<pb::GenerateRequest>,
) -> Result<Transcript, Status> {
    let mut request = Request::new(request.into());
    request.set_timeout(Duration::from_secs(300));
    let mut events = inference.generate(request).await?.into_inner();
    let mut transcript = Transcript::default();
    while let Some(response) = events.message().await? {
        transcript.apply(&response.event.expect("an event")).expect("in order");
    }
    assert!(transcript.summary.is_some(), "the stream ended early");
    Ok(transcript)
}

/// All of them, with at most `together` under way at a time.
pub async fn ask_all(
    inference: &InferenceClient<Channel>,
    requests: &[GenerateRequest],
    together: usize,
) -> Vec<Transcript> {
    let turns = Arc::new(tokio::sync::Semaphore::new(together));
    let tasks: Vec<_> = requests
        .iter()
        .cloned()
        .map(|request| {
            let (mut inference, turns) = (inference.clone(), Arc::clone(&turns));
            tokio::spawn(async move {
                let _turn = turns.acquire_owned().await.unwrap();
                ask(&mut inference, request).await.unwrap()
            })
        })
        .collect();
    let mut transcripts = Vec::with_capacity(tasks.len());
    for task in tasks {
        transcripts.push(task.await.unwrap());
    }
    transcripts
}
