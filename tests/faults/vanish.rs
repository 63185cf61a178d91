//! Thousands of clients that come and vanish at any moment, in any way: nothing of them stays, and nobody else notices.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use h2::client::SendRequest;
use prost::{Message as _, bytes::Bytes};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::codegen::http;
use uniarm_proto::{ClusterClient, GenerateRequest, pb};

use crate::{
    fleet::{Fleet, Places},
    harness::{Running, machine, request},
    held::{self, Held},
    load::{Answered, ask_all, ask_while, assert_undisturbed, mixed_requests},
};

/// Clients of the long run; `UNIARM_CLIENTS` says otherwise.
const CLIENTS: usize = 10_000;

/// Those of the short one.
const CLIENTS_FEW: usize = 200;

/// Clients that vanish at the same time as others come.
const TOGETHER: usize = 32;

/// One in so many falls silent: it neither reads nor closes, and holds its place until it is found out.
const SILENT_ONE_IN: u64 = 50;

/// What a silent client has asked for: it is written although nobody reads it.
const SILENT_TOKENS: u32 = 24;

/// What the others have asked for: it ends only because they vanish.
const ENDLESS_TOKENS: u32 = 4000;

/// A router finds a silent client of gRPC within 15 s, and closes an idle connection of HTTP after 30 s.
const FOUND_WITHIN: Duration = Duration::from_secs(90);

/// A client waits at most so long for what it wanted to see before it vanishes: a full machine is slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// How far a client gets.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// Half of its request is sent.
    Asking,
    /// It has asked, and hears nothing yet.
    Waiting,
    /// It has heard so many pieces of its answer.
    Reading(usize),
}

/// How it goes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Manner {
    Close,
    /// As a crashed process with unread data.
    Reset,
    /// gRPC: the stream is cancelled, and the connection closed in order. HTTP: only its own direction is closed.
    HangUp,
    /// The connection stays, and nobody is there.
    Silence,
}

#[derive(Debug, Clone, Copy)]
struct Client {
    index: usize,
    is_http: bool,
    moment: Moment,
    manner: Manner,
}

/// What stays of a client that fell silent: dropped at the end, its connection closes.
enum Silent {
    Grpc { _connection: Box<dyn std::any::Any + Send> },
    Http { _connection: TcpStream },
}

/// What the clients beside them ask, and hear.
struct Steady {
    requests: Vec<GenerateRequest>,
    undisturbed: Vec<Answered>,
}

// === impl Client ===

impl Client {
    /// `may_be_silent`: finding that out takes the cluster its time.
    fn drawn(seed: u64, index: usize, may_be_silent: bool) -> Self {
        let mut draws = 0;
        let mut draw = |below: u64| {
            draws += 1;
            uniarm_batch::seed(seed, &["vanishing", &index.to_string(), &draws.to_string()]) % below
        };
        let manner = match draw(3) {
            _ if may_be_silent && draw(SILENT_ONE_IN) == 0 => Manner::Silence,
            0 => Manner::Close,
            1 => Manner::Reset,
            _ => Manner::HangUp,
        };
        let moment = match draw(8) {
            0 => Moment::Asking,
            1..=3 => Moment::Waiting,
            _ => Moment::Reading(1 + draw(4) as usize),
        };
        Self { index, is_http: draw(5) < 2, moment, manner }
    }

    fn tokens(&self) -> u32 {
        if self.manner == Manner::Silence { SILENT_TOKENS } else { ENDLESS_TOKENS }
    }

    /// A few milliseconds, another number for each client: a request is somewhere between its arrival and its first token.
    fn wait(&self) -> Duration {
        Duration::from_millis(self.index as u64 * 7 % 50)
    }

    async fn come_and_go(self, endpoint: &str, door: &str) -> Option<Silent> {
        if self.is_http { self.by_http(door).await } else { self.by_grpc(endpoint).await }
    }

    async fn by_grpc(self, address: &str) -> Option<Silent> {
        let tcp = TcpStream::connect(address).await.unwrap();
        if self.manner == Manner::Reset {
            tcp.set_zero_linger().unwrap();
        }
        let (requests, mut connection) = h2::client::handshake(tcp).await.unwrap();
        // It is driven here, so that it stands still where this client does.
        let left = tokio::select! {
            left = timeout(PATIENCE, self.call(address, requests)) => left,
            // The router had enough of it.
            _ = &mut connection => return None,
        };
        let held = left.unwrap_or_else(|_| panic!("{self:?} hears nothing"));
        match self.manner {
            Manner::Silence => Some(Silent::Grpc { _connection: Box::new((connection, held)) }),
            Manner::HangUp => {
                // Cancels its stream; then the connection has none, and says goodbye.
                drop(held);
                let _ = timeout(PATIENCE, connection).await;
                None
            }
            Manner::Close | Manner::Reset => None,
        }
    }

    /// What must be kept for the call to stay as it is.
    async fn call(self, address: &str, requests: SendRequest<Bytes>) -> Box<dyn std::any::Any + Send> {
        let mut requests = requests.ready().await.unwrap();
        let uri = format!("http://{address}/uniarm.v1.Inference/Generate");
        let head =
            http::Request::post(uri).header("content-type", "application/grpc").header("te", "trailers");
        let (answer, mut body) = requests.send_request(head.body(()).unwrap(), false).unwrap();
        let message = self.message();
        if let Moment::Asking = self.moment {
            let half = message.slice(..message.len() / 2);
            body.send_data(half, false).unwrap();
            sleep(self.wait()).await;
            return Box::new((requests, answer, body));
        }
        body.send_data(message, true).unwrap();
        let Moment::Reading(pieces) = self.moment else {
            sleep(self.wait()).await;
            return Box::new((requests, answer, body));
        };
        let answer = answer.await.unwrap();
        assert!(answer.headers().get("grpc-status").is_none(), "{self:?}: {answer:?}");
        let mut answer = answer.into_body();
        for _ in 0..pieces {
            let piece = answer.data().await.unwrap_or_else(|| panic!("{self:?}: no answer")).unwrap();
            answer.flow_control().release_capacity(piece.len()).unwrap();
        }
        Box::new((requests, answer, body))
    }

    /// As gRPC frames it: not compressed, its length, itself.
    fn message(&self) -> Bytes {
        let mut asked = request(&self.prompt(), &[("positive", 0.5), ("concise", 0.5)]);
        asked.sampling.max_tokens = self.tokens();
        asked.sampling.ignore_eos = true;
        asked.sampling.seed = Some(self.index as u64);
        if self.index.is_multiple_of(4) {
            asked.guidance.clear();
        }
        let message = pb::GenerateRequest::from(asked).encode_to_vec();
        [&[0][..], &(message.len() as u32).to_be_bytes(), &message].concat().into()
    }

    async fn by_http(self, address: &str) -> Option<Silent> {
        let mut tcp = TcpStream::connect(address).await.unwrap();
        if self.manner == Manner::Reset {
            tcp.set_zero_linger().unwrap();
        }
        let whole = self.http_message(address);
        // Half of it may end in the head as well as in the body.
        let sent = match self.moment {
            Moment::Asking => whole.len() * (1 + self.index % 3) / 4,
            Moment::Waiting | Moment::Reading(_) => whole.len(),
        };
        tcp.write_all(&whole.as_bytes()[..sent]).await.unwrap();
        if let Moment::Reading(pieces) = self.moment {
            let heard = timeout(PATIENCE, events(&mut tcp, pieces)).await;
            assert!(heard.is_ok(), "{self:?} hears nothing");
        } else {
            sleep(self.wait()).await;
        }
        match self.manner {
            Manner::Silence => return Some(Silent::Http { _connection: tcp }),
            Manner::HangUp => {
                let _ = tcp.shutdown().await;
                // Whoever sends no more wants no more: the router ends the answer, too.
                let _ = timeout(PATIENCE, tcp.read_to_end(&mut Vec::new())).await.expect("it is cut");
            }
            Manner::Close | Manner::Reset => {}
        }
        None
    }

    fn http_message(&self, address: &str) -> String {
        let body = json!({
            "messages": [{ "role": "user", "content": self.prompt() }], "max_tokens": self.tokens(), "ignore_eos": true,
            "stream": !self.index.is_multiple_of(3) || matches!(self.moment, Moment::Reading(_)),
            "guidance": { "preference": { "positive": 1 } },
        })
        .to_string();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json"
        );
        format!("{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    }

    fn prompt(&self) -> String {
        format!("Count to {}.", 100 + self.index % 7)
    }
}

/// Reads until so many events of a stream are here.
async fn events(tcp: &mut TcpStream, count: usize) {
    let (mut heard, mut buffer) = (Vec::new(), [0; 4096]);
    while heard.windows(6).filter(|window| window == b"data: ").count() < count {
        let read = tcp.read(&mut buffer).await.unwrap();
        assert!(read > 0, "{}", String::from_utf8_lossy(&heard));
        heard.extend_from_slice(&buffer[..read]);
        assert!(heard.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&heard));
    }
}

/// So many clients, a few at a time; returns those that fell silent.
async fn visit(
    clients: std::ops::Range<usize>,
    (seed, may_be_silent): (u64, bool),
    fleet: &Fleet,
) -> Vec<Silent> {
    let next = Arc::new(AtomicUsize::new(clients.start));
    let mut visitors = JoinSet::new();
    for _ in 0..TOGETHER {
        let (next, end) = (Arc::clone(&next), clients.end);
        let (endpoints, doors) = (fleet.endpoints.clone(), fleet.doors.clone());
        visitors.spawn(async move {
            let mut silent = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= end {
                    return silent;
                }
                let router = index % endpoints.len();
                let client = Client::drawn(seed, index, may_be_silent);
                silent.extend(client.come_and_go(&endpoints[router], &doors[router]).await);
            }
        });
    }
    visitors.join_all().await.into_iter().flatten().collect()
}

/// Steady clients, until it is over for the others; how many answers they got, and their longest pause.
async fn steady_clients(
    cluster: ClusterClient,
    load: Steady,
    are_over: Arc<AtomicBool>,
) -> (usize, Duration) {
    let go_on = move |started| started < 2 || !are_over.load(Ordering::Relaxed);
    let answered = ask_while(&cluster, &load.requests, 2, go_on).await;
    assert_undisturbed(&answered, &load.undisturbed, &load.requests);
    let silences = answered.iter().flat_map(|answered| &answered.silences);
    (answered.len(), silences.map(|silence| silence.until - silence.from).max().unwrap_or_default())
}

/// The first of them open every connection that is kept, and touch memory that is used again. What is held then.
async fn first_visit(clients: usize, kinds: (u64, bool), fleet: &Fleet, processes: &[&Running]) -> Vec<Held> {
    let silent = visit(0..clients, kinds, fleet).await;
    println!("{} of the first {clients} clients fell silent", silent.len());
    tokio::task::block_in_place(|| held::rest(processes, FOUND_WITHIN));
    drop(silent);
    tokio::task::block_in_place(|| held::rest(processes, FOUND_WITHIN))
}

async fn clients_vanish(count: usize, may_be_silent: bool) {
    let seed = std::env::var("UNIARM_FAULT_SEED").map_or(1, |seed| seed.parse().unwrap());
    println!("UNIARM_FAULT_SEED={seed}");
    // Blocks of a prefix that is kept are taken without anybody's fault.
    let fleet = Fleet::start_at(&Places::here(), &["--no-prefix-cache"]);
    let cluster = fleet.client().await;
    let requests = mixed_requests(12, 24);
    let undisturbed = ask_all(&cluster, &requests, 4).await;
    let load = Steady { requests, undisturbed };
    let members: Vec<_> = fleet.members.iter().map(|member| member.lock().unwrap()).collect();
    let processes: Vec<&Running> = members.iter().map(|member| &**member).collect();
    let (first, kinds) = ((count / 10).max(2 * TOGETHER), (seed, may_be_silent));
    let before = first_visit(first, kinds, &fleet, &processes).await;

    let are_over = Arc::new(AtomicBool::new(false));
    let beside = tokio::spawn(steady_clients(cluster.clone(), load, Arc::clone(&are_over)));
    let began = Instant::now();
    let silent = visit(first..count, kinds, &fleet).await;
    are_over.store(true, Ordering::Relaxed);
    let (vanished, seconds) = (count - first, began.elapsed().as_secs_f64());
    println!("{vanished} clients vanished in {seconds:.0} s, {} of them silently", silent.len());
    let (answers, pause) = beside.await.unwrap();
    println!("{answers} answers beside them are what they were; their longest pause was {pause:.2?}");

    // Those who fell silent are still there: what they hold is taken from them.
    let took = tokio::task::block_in_place(|| held::is_back(&processes, &before, FOUND_WITHIN));
    println!("everything is back {:.1} s after the last one", took.as_secs_f64());
    drop(silent);
}

#[tokio::test(flavor = "multi_thread")]
async fn some_hundred_clients_vanish_and_leave_nothing() {
    let _machine = machine();
    clients_vanish(CLIENTS_FEW, false).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: make test-faults"]
async fn ten_thousand_clients_vanish_and_leave_nothing() {
    let _machine = machine();
    let count = std::env::var("UNIARM_CLIENTS").map_or(CLIENTS, |count| count.parse().unwrap());
    clients_vanish(count, true).await;
}
