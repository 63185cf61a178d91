//! The end of a lane that whole rows come out of, beside the stream to a reward worker.
//!
//! The stream says which rows the lane brings, in which order. So batches wait here until their rows are there, and what comes
//! behind them waits, too: whoever reads them finds what it would have found without a lane. A thread has the lane's
//! end; a lane that fails ends the stream, since nobody can say what of it was lost.

use std::{
    collections::{HashMap, VecDeque},
    future,
    sync::Arc,
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use uniarm_model::{Hangup, RowLanes};
use uniarm_proto::{LaneState, ReplyBatch, RewardWorker, SessionReply};
use uniarm_runtime::{Metrics, prometheus_client::metrics::counter::Counter};

/// How long a worker whose lane was refused, or has failed, is offered none: what broke a lane is a device, a library or a network,
/// which do not mend within seconds, and each failure costs all sessions of the stream.
const REST: Duration = Duration::from_secs(300);

/// A lane's thread says that it has joined, brings the rows of one batch at a time, and says why it ends.
const EVENTS_MAX: usize = 3;

/// Offers lanes to reward workers.
#[derive(Clone)]
pub struct Lanes(Arc<Shared>);

struct Shared {
    lanes: Arc<dyn RowLanes>,
    /// Until when workers are left alone. Looked at once in each life of a stream.
    resting: Mutex<HashMap<RewardWorker, Instant>>,
    rows: Counter,
    bytes: Counter,
}

/// Batches of one stream, in their order, on their way to the engine.
pub(crate) struct Arrivals {
    worker: RewardWorker,
    lane: Option<Lane>,
    /// The protocol bounds it, as it bounds the channel behind it: a session has at most one row and one answer outstanding.
    batches: VecDeque<ReplyBatch>,
}

/// Why a stream has to end.
#[derive(Debug, thiserror::Error)]
#[error("the lane of whole rows is closed: {0}")]
pub(crate) struct LaneLost(String);

/// One lane, whose other end may not be there yet.
struct Lane {
    shared: Arc<Shared>,
    asks: mpsc::Sender<Vec<usize>>,
    events: mpsc::Receiver<Event>,
    /// Once this end has joined.
    hangup: Option<Hangup>,
    /// The worker has joined.
    is_agreed: bool,
    is_asked: bool,
}

/// What the lane's thread says: that it has joined, the rows that it was asked for, and why there will be none.
enum Event {
    Joined(Hangup),
    Rows(Vec<Vec<f32>>),
    Failed(String),
}

// === impl Lanes ===

impl Lanes {
    pub fn new(lanes: Arc<dyn RowLanes>, metrics: &Metrics) -> Self {
        let metrics = metrics.scope("base");
        Self(Arc::new(Shared {
            lanes,
            resting: Mutex::default(),
            rows: metrics.counter("lane_rows", "Whole reward rows that came from GPU to GPU"),
            bytes: metrics.counter("lane_bytes", "Payload of these rows, which is part of the exchange's"),
        }))
    }

    /// Whether a lane is offered to this worker, whose stream has just come up.
    pub(crate) fn may_offer(&self, worker: &RewardWorker) -> bool {
        let mut resting = self.0.resting.lock();
        resting.retain(|_, until| *until > Instant::now());
        let rests = resting.contains_key(worker);
        if rests {
            tracing::info!(worker = %worker.member, "whole rows come over the stream: its last lane closed not long ago");
        }
        !rests
    }

    /// Makes one end of a lane, on a thread of its own; `offer` gets what the other end has to know.
    fn open(&self, offer: oneshot::Sender<Vec<u8>>) -> Lane {
        let (asks, asked) = mpsc::channel(1);
        let (say, events) = mpsc::channel(EVENTS_MAX);
        let (lanes, refuse) = (Arc::clone(&self.0.lanes), say.clone());
        let serving = move || {
            let Err(reason) = attend(&*lanes, offer, asked, &say) else { return };
            let _ = say.blocking_send(Event::Failed(reason));
        };
        if let Err(error) = thread::Builder::new().name("lane".into()).spawn(serving) {
            let _ = refuse.try_send(Event::Failed(format!("the operating system gives no thread: {error}")));
        }
        let shared = Arc::clone(&self.0);
        Lane { shared, asks, events, hangup: None, is_agreed: false, is_asked: false }
    }
}

/// Brings rows as long as somebody asks for some.
fn attend(
    lanes: &dyn RowLanes,
    offer: oneshot::Sender<Vec<u8>>,
    mut asked: mpsc::Receiver<Vec<usize>>,
    say: &mpsc::Sender<Event>,
) -> Result<(), String> {
    let known = lanes.offer().map_err(|error| error.to_string())?;
    if offer.send(known.clone()).is_err() {
        return Ok(());
    }
    let mut receiver = lanes.receiver(&known).map_err(|error| error.to_string())?;
    let _ = say.blocking_send(Event::Joined(receiver.hangup()));
    while let Some(lengths) = asked.blocking_recv() {
        let rows = receiver.receive(&lengths).map_err(|error| error.to_string())?;
        let _ = say.blocking_send(Event::Rows(rows));
    }
    Ok(())
}

// === impl Arrivals ===

impl Arrivals {
    /// Of a stream that has just come up. A lane is made where `offer` wants one.
    pub(crate) fn new(worker: RewardWorker, offer: Option<(Lanes, oneshot::Sender<Vec<u8>>)>) -> Self {
        let lane = offer.map(|(lanes, offer)| lanes.open(offer));
        Self { worker, lane, batches: VecDeque::new() }
    }

    /// Takes in a batch as it came.
    ///
    /// # Errors
    /// When the worker says that its end is closed, and there was a lane.
    pub(crate) fn push(&mut self, mut batch: ReplyBatch) -> Result<(), LaneLost> {
        match batch.lane.take() {
            Some(LaneState::Joined) => {
                if let Some(lane) = &mut self.lane {
                    lane.is_agreed = true;
                    tracing::info!(worker = %self.worker.member, "whole rows come from GPU to GPU");
                }
            }
            Some(LaneState::Closed(reason)) => self.close(reason)?,
            None => {}
        }
        self.batches.push_back(batch);
        Ok(())
    }

    /// The next batch, with all of its rows. Never, as long as there is none; nothing is lost by asking again.
    ///
    /// # Errors
    /// When rows do not come that were announced.
    pub(crate) async fn next(&mut self) -> Result<ReplyBatch, LaneLost> {
        loop {
            let wanted = self.batches.front().map(lengths).unwrap_or_default();
            if wanted.is_empty()
                && let Some(batch) = self.batches.pop_front()
            {
                return Ok(batch);
            }
            let Some(lane) = &mut self.lane else {
                if wanted.is_empty() {
                    return future::pending().await;
                }
                return Err(LaneLost("a row was announced on it, and there is none".to_owned()));
            };
            if !wanted.is_empty() {
                lane.ask(&wanted);
            }
            match lane.events.recv().await {
                Some(Event::Joined(hangup)) => lane.hangup = Some(hangup),
                Some(Event::Rows(rows)) => {
                    lane.count(&rows);
                    fill(self.batches.front_mut().expect("rows are asked for a batch"), rows);
                }
                Some(Event::Failed(reason)) => self.close(reason)?,
                None => self.close("its thread has ended".to_owned())?,
            }
        }
    }

    /// There is no lane, or none any more. What was announced on it is lost.
    fn close(&mut self, reason: String) -> Result<(), LaneLost> {
        let Some(lane) = self.lane.take() else { return Ok(()) };
        lane.shared.resting.lock().insert(self.worker.clone(), Instant::now() + REST);
        if lane.is_agreed {
            return Err(LaneLost(reason));
        }
        tracing::info!(worker = %self.worker.member, %reason, "whole rows come over the stream");
        Ok(())
    }
}

// === impl Lane ===

impl Lane {
    /// Asks for rows of these lengths, once, and not before this end has joined: until then nothing could be hung up.
    fn ask(&mut self, lengths: &[usize]) {
        if self.hangup.is_some() && !self.is_asked {
            // A thread that has ended has said why.
            self.is_asked = self.asks.try_send(lengths.to_vec()).is_ok();
        }
    }

    fn count(&mut self, rows: &[Vec<f32>]) {
        self.is_asked = false;
        self.shared.rows.inc_by(rows.len() as u64);
        let values: usize = rows.iter().map(Vec::len).sum();
        self.shared.bytes.inc_by((values * size_of::<f32>()) as u64);
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if let Some(hangup) = &self.hangup {
            hangup.close();
        }
    }
}

/// Of the rows of a batch that a lane brings.
fn lengths(batch: &ReplyBatch) -> Vec<usize> {
    let length = |reply: &SessionReply| match reply {
        SessionReply::Row(row) => row.lane_values as usize,
        SessionReply::Answer(answer) => answer.lane_values as usize,
        SessionReply::Opened { .. } | SessionReply::Failure(_) => 0,
    };
    batch.replies.iter().map(|(.., reply)| length(reply)).filter(|length| *length > 0).collect()
}

/// Puts rows where they belong: what follows does not know which way they came.
fn fill(batch: &mut ReplyBatch, rows: Vec<Vec<f32>>) {
    let mut rows = rows.into_iter();
    for (.., reply) in &mut batch.replies {
        let (values, lane_values) = match reply {
            SessionReply::Row(row) => (&mut row.values, &mut row.lane_values),
            SessionReply::Answer(answer) => (&mut answer.values, &mut answer.lane_values),
            SessionReply::Opened { .. } | SessionReply::Failure(_) => continue,
        };
        if std::mem::take(lane_values) > 0 {
            *values = rows.next().expect("as many rows as were asked for");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc as blocking;

    use uniarm_model::{ModelError, RowReceiver, RowSender};
    use uniarm_proto::{Answer, Generation, MemberId, SessionGeneration, SessionId, SessionRow};

    use super::*;

    /// Ends that receive what a test sends.
    #[derive(Debug)]
    struct Scripted(Mutex<Option<blocking::Receiver<Vec<f32>>>>);

    struct Script(blocking::Receiver<Vec<f32>>);

    impl RowLanes for Scripted {
        fn offer(&self) -> Result<Vec<u8>, ModelError> {
            Ok(vec![7])
        }

        fn receiver(&self, offer: &[u8]) -> Result<Box<dyn RowReceiver>, ModelError> {
            assert_eq!(offer, [7]);
            let script = self.0.lock().take();
            let script = script.ok_or_else(|| ModelError::Device("it is gone".to_owned()))?;
            Ok(Box::new(Script(script)))
        }

        fn sender(&self, _: &[u8]) -> Result<Box<dyn RowSender>, ModelError> {
            unreachable!("a base worker receives")
        }
    }

    impl RowReceiver for Script {
        fn receive(&mut self, lengths: &[usize]) -> Result<Vec<Vec<f32>>, ModelError> {
            let next = |length: &usize| {
                let row = self.0.recv().map_err(|_| ModelError::Device("it fell off the bus".to_owned()))?;
                assert_eq!(row.len(), *length);
                Ok(row)
            };
            lengths.iter().map(next).collect()
        }

        fn hangup(&self) -> Hangup {
            Hangup::new(|| {})
        }
    }

    fn worker() -> RewardWorker {
        RewardWorker { member: MemberId("reward".into()), generation: Generation(1), address: String::new() }
    }

    fn row(position: u32, lane_values: u32) -> SessionReply {
        SessionReply::Row(SessionRow {
            position,
            ids: Vec::new(),
            values: Vec::new(),
            lane_values,
            log_normalizer: 0.0,
            floor: None,
            branch: 0,
            draft: None,
        })
    }

    fn answer(position: u32, lane_values: u32) -> SessionReply {
        SessionReply::Answer(Answer { position, ids: Vec::new(), values: Vec::new(), lane_values })
    }

    fn batch(replies: Vec<SessionReply>) -> ReplyBatch {
        let of_session = |reply| (SessionId(1), SessionGeneration(1), reply);
        ReplyBatch { replies: replies.into_iter().map(of_session).collect(), ..ReplyBatch::default() }
    }

    fn joined() -> ReplyBatch {
        ReplyBatch { lane: Some(LaneState::Joined), ..ReplyBatch::default() }
    }

    fn closed() -> ReplyBatch {
        ReplyBatch { lane: Some(LaneState::Closed("no GPU".to_owned())), ..ReplyBatch::default() }
    }

    /// Arrivals with a lane, what it brings, and who offers others.
    async fn arrivals() -> (Arrivals, blocking::Sender<Vec<f32>>, Lanes) {
        let (rows, script) = blocking::channel();
        let lanes = Lanes::new(Arc::new(Scripted(Mutex::new(Some(script)))), &Metrics::new());
        let (offer, offered) = oneshot::channel();
        let arrivals = Arrivals::new(worker(), Some((lanes.clone(), offer)));
        assert_eq!(offered.await.expect("an offer"), [7]);
        (arrivals, rows, lanes)
    }

    #[tokio::test]
    async fn what_comes_behind_a_row_on_the_lane_waits_for_it() {
        let (mut arrivals, rows, _) = arrivals().await;
        arrivals.push(joined()).expect("good news");
        let before = batch(vec![row(0, 0)]);
        let behind = batch(vec![answer(2, 0)]);
        arrivals.push(before.clone()).expect("it is here");
        arrivals.push(batch(vec![row(1, 2), answer(1, 0), answer(1, 3)])).expect("a lane");
        arrivals.push(behind.clone()).expect("it is here");
        assert_eq!(arrivals.next().await.expect("all is here"), ReplyBatch::default());
        assert_eq!(arrivals.next().await.expect("all is here"), before);
        for pieces in [vec![1.0, 2.0], vec![3.0, 4.0, 5.0]] {
            // Nothing is lost, and nothing asked twice, by whoever looks elsewhere meanwhile.
            for _ in 0..3 {
                let early = tokio::time::timeout(Duration::from_millis(5), arrivals.next()).await;
                assert!(early.is_err(), "its rows are not there");
            }
            rows.send(pieces).expect("the lane is open");
        }
        let mut filled = batch(vec![row(1, 0), answer(1, 0), answer(1, 0)]);
        let SessionReply::Row(first) = &mut filled.replies[0].2 else { unreachable!("as made") };
        first.values = vec![1.0, 2.0];
        let SessionReply::Answer(last) = &mut filled.replies[2].2 else { unreachable!("as made") };
        last.values = vec![3.0, 4.0, 5.0];
        assert_eq!(arrivals.next().await.expect("its rows are there"), filled);
        assert_eq!(arrivals.next().await.expect("all is here"), behind);
    }

    #[tokio::test]
    async fn a_lane_that_was_refused_costs_nothing_and_one_that_is_lost_the_stream() {
        let (mut arrivals, _rows, lanes) = arrivals().await;
        assert!(lanes.may_offer(&worker()));
        arrivals.push(closed()).expect("rows come over the stream");
        assert_eq!(arrivals.next().await.expect("all is here"), ReplyBatch::default());
        assert!(!lanes.may_offer(&worker()), "it is left alone for a while");
        let restarted = RewardWorker { generation: Generation(2), ..worker() };
        assert!(lanes.may_offer(&restarted), "another life of it may have a GPU");
        arrivals.push(batch(vec![row(0, 2)])).expect("it is read later");
        let lost = arrivals.next().await.expect_err("no lane brings it").to_string();
        assert!(lost.contains("there is none"), "{lost}");

        // Closed by the worker, while a row is waited for; and by the lane itself.
        for by_worker in [true, false] {
            let (mut arrivals, rows, lanes) = self::arrivals().await;
            arrivals.push(joined()).expect("good news");
            assert!(arrivals.next().await.is_ok());
            arrivals.push(batch(vec![row(0, 2)])).expect("a lane");
            assert!(tokio::time::timeout(Duration::from_millis(20), arrivals.next()).await.is_err());
            if by_worker {
                let lost = arrivals.push(closed()).expect_err("a row is lost").to_string();
                assert!(lost.contains("no GPU"), "{lost}");
                drop(rows);
            } else {
                drop(rows);
                let lost = arrivals.next().await.expect_err("a row is lost").to_string();
                assert!(lost.contains("fell off the bus"), "{lost}");
            }
            assert!(!lanes.may_offer(&worker()));
        }
    }
}
