//! `uniarm bench exchange`: what reward rows cost on their way, over a real gRPC stream and inside one process.
//!
//! A stand-in for the reward engine answers each message at once with rows that are ready: what is measured is the way
//! alone, from the operations in the base worker's hands to the decoded rows in them.

use std::{pin::Pin, sync::Arc, time::Instant};

use anyhow::Context as _;
use futures_util::{Stream, StreamExt as _};
use indicatif::{ProgressBar, ProgressStyle};
use prost::Message as _;
use serde::Serialize;
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, Streaming};
use uniarm_base::{GrpcScorer, LinkStream, Scorer as _};
use uniarm_decode::{Noise, noisy_top_list};
use uniarm_proto::{
    Advance, Generation, MemberId, OpBatch, ReplyBatch, RewardWorker, SessionGeneration, SessionId,
    SessionOp, SessionReply, SessionRow,
    limits::WORKER_MESSAGE_BYTES_MAX,
    pb::{
        self,
        reward_server::{Reward, RewardServer},
    },
    session::reply_to_wire,
};
use uniarm_runtime::{
    Readiness, Shutdown,
    grpc::{GrpcOptions, GrpcServer},
};

use super::{
    args::BenchExchangeArgs,
    statistics::{Spread, bar},
};

/// Round trips before the measurement: connections warm up.
const WARM_UP: u32 = 5;

/// Characters of the longest bar.
const BAR: usize = 20;

#[derive(Serialize)]
struct Report {
    list_length: u32,
    rounds: u32,
    cases: Vec<Case>,
}

#[derive(Serialize)]
struct Case {
    vocabulary: usize,
    batch: usize,
    mode: &'static str,
    way: &'static str,
    /// Of the message that carries the rows, encoded.
    bytes_per_row: f64,
    us_per_row: Spread,
}

/// Answers every message with the same rows.
#[derive(Clone)]
struct Echo {
    rows: Arc<ReplyBatch>,
}

pub async fn run(args: BenchExchangeArgs) -> anyhow::Result<()> {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").context("a template")?;
    let progress = ProgressBar::new((args.vocabulary.len() * args.batch.len() * 4) as u64).with_style(style);
    let mut cases = Vec::new();
    for &vocabulary in &args.vocabulary {
        for &batch in &args.batch {
            for (mode, length) in [("certified", args.list_length as usize), ("dense", 0)] {
                let rows = Arc::new(rows(vocabulary, batch, length));
                let bytes_per_row = to_wire(ReplyBatch::clone(&rows)).encoded_len() as f64 / batch as f64;
                anyhow::ensure!(
                    bytes_per_row * batch as f64 <= WORKER_MESSAGE_BYTES_MAX as f64,
                    "--batch {batch} of --vocabulary {vocabulary} is more than one message may hold"
                );
                let echo = Echo { rows };
                for way in ["gRPC", "in process"] {
                    progress.set_message(format!("{vocabulary} tokens, {batch} rows, {mode}, {way}"));
                    let stream = if way == "gRPC" { echo.dial_over_grpc().await? } else { echo.dial() };
                    let us_per_row = time(stream, batch, args.rounds).await?;
                    cases.push(Case { vocabulary, batch, mode, way, bytes_per_row, us_per_row });
                    progress.inc(1);
                }
            }
        }
    }
    progress.finish_and_clear();
    let report = Report { list_length: args.list_length, rounds: args.rounds, cases };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        report.print();
    }
    Ok(())
}

/// Rows of a step: lists ranked with the noise, or, without a length, whole rows.
fn rows(vocabulary: usize, batch: usize, length: usize) -> ReplyBatch {
    let mut logits = vec![0.0; vocabulary];
    let reply = |session: usize| {
        let noise = Noise::new(session as u64, 0);
        noise.fill(0, &mut logits);
        let (ids, values, floor) = if length == 0 {
            (Vec::new(), logits.clone(), None)
        } else {
            let list = noisy_top_list(&logits, length, 1.0, &noise, 1);
            (list.ids().to_vec(), list.values().to_vec(), list.ranking().map(|ranking| ranking.floor))
        };
        let row = SessionRow {
            position: 1,
            ids,
            values,
            lane_values: 0,
            log_normalizer: 1.0,
            floor,
            branch: 0,
            draft: None,
        };
        (SessionId(session as u64), SessionGeneration(0), SessionReply::Row(row))
    };
    ReplyBatch { replies: (0..batch).map(reply).collect(), ..ReplyBatch::default() }
}

/// What a base worker sends after a step.
fn ops(batch: usize) -> OpBatch {
    let op = |session: usize| {
        let advance = Advance { position: 0, ids: vec![session as u32], branch: 0, chosen: 1 };
        (SessionId(session as u64), SessionGeneration(0), SessionOp::Advance(advance))
    };
    (0..batch).map(op).collect()
}

/// Microseconds from the operations of a step to its rows, for each row.
async fn time(mut stream: LinkStream, batch: usize, rounds: u32) -> anyhow::Result<Spread> {
    let mut micros = Vec::new();
    for round in 0..WARM_UP + rounds {
        let began = Instant::now();
        stream.ops.send(ops(batch)).await.context("the stream is open")?;
        let replies = stream.replies.recv().await.context("the stand-in answers")?;
        anyhow::ensure!(replies.replies.len() == batch, "{} rows of {batch}", replies.replies.len());
        if round >= WARM_UP {
            micros.push(began.elapsed().as_secs_f64() * 1e6 / batch as f64);
        }
    }
    anyhow::ensure!(!micros.is_empty(), "--rounds wants at least one");
    Ok(Spread::of(micros))
}

fn to_wire(batch: ReplyBatch) -> pb::RewardReply {
    let replies = batch.replies.into_iter();
    let replies = replies.map(|(session, generation, reply)| reply_to_wire(session, generation, reply));
    pb::RewardReply { replies: replies.collect(), ..pb::RewardReply::default() }
}

// === impl Echo ===

impl Echo {
    /// On the loopback interface, with the product's own server and client settings.
    async fn dial_over_grpc(&self) -> anyhow::Result<LinkStream> {
        let server = GrpcServer::bind("127.0.0.1:0", GrpcOptions::default(), Readiness::starting()).await?;
        let address = server.local_addr().to_string();
        let service = RewardServer::new(self.clone())
            .max_decoding_message_size(WORKER_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(WORKER_MESSAGE_BYTES_MAX);
        tokio::spawn(server.add_service(service).serve(Shutdown::new()));
        let worker = RewardWorker { member: MemberId("echo".into()), generation: Generation(1), address };
        Ok(GrpcScorer::default().dial(&worker).await?)
    }

    /// Through the same channels that a reward engine in this process answers through.
    fn dial(&self) -> LinkStream {
        let (ops, mut incoming) = mpsc::channel::<OpBatch>(1);
        let (outgoing, replies) = mpsc::unbounded_channel();
        let rows = Arc::clone(&self.rows);
        tokio::spawn(async move {
            while incoming.recv().await.is_some() && outgoing.send(ReplyBatch::clone(&rows)).is_ok() {}
        });
        LinkStream { ops, replies }
    }
}

#[tonic::async_trait]
impl Reward for Echo {
    type ExchangeStream = Pin<Box<dyn Stream<Item = Result<pb::RewardReply, Status>> + Send>>;

    async fn exchange(
        &self,
        request: Request<Streaming<pb::RewardRequest>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let rows = Arc::clone(&self.rows);
        let answers = request.into_inner().map(move |ops| ops.map(|_| to_wire(ReplyBatch::clone(&rows))));
        Ok(Response::new(Box::pin(answers)))
    }
}

// === impl Report ===

impl Report {
    fn print(&self) {
        println!(
            "from the operations of a step to its decoded rows, for each row; lists of {}; median of {} round trips\n",
            self.list_length, self.rounds
        );
        println!(
            "{:>10} {:>5}  {:10} {:10} {:>10} {:>9} {:>19}",
            "vocabulary", "rows", "mode", "way", "bytes/row", "µs/row", "range"
        );
        let most = self.cases.iter().map(|case| case.us_per_row.median).fold(0.0, f64::max);
        for case in &self.cases {
            let Spread { median, least, most: highest } = case.us_per_row;
            println!(
                "{:>10} {:>5}  {:10} {:10} {:>10.0} {median:>9.1} {:>19}  {}",
                case.vocabulary,
                case.batch,
                case.mode,
                case.way,
                case.bytes_per_row,
                format!("{least:.1} – {highest:.1}"),
                bar(median, most, BAR)
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn both_ways_bring_every_row() {
        for length in [4, 0] {
            let echo = Echo { rows: Arc::new(rows(300, 3, length)) };
            for mut stream in [echo.dial_over_grpc().await.unwrap(), echo.dial()] {
                stream.ops.send(ops(3)).await.unwrap();
                assert_eq!(stream.replies.recv().await.unwrap(), *echo.rows);
            }
        }
    }
}
