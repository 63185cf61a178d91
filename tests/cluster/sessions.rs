//! A reward worker and a base worker that does everything wrong: late, repeated, foreign and impossible messages.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use uniarm_proto::{
    Advance, ChatMessage, Failure, FailureCode, Input, Member, Open, Priority, Sampling, SessionGeneration,
    SessionId, SessionOp, SessionPace, SessionReply, SessionRow, TokenizerFingerprint, client, pb,
    session::{op_to_wire, reply_from_wire},
};

use crate::harness::{PROMPTED, Running, demo_model, machine};

/// Long enough for a step, short enough to wait for silence.
const SILENCE: Duration = Duration::from_millis(400);

/// One stream to a reward worker.
struct Stream {
    ops: mpsc::Sender<pb::RewardRequest>,
    replies: Streaming<pb::RewardReply>,
    read: std::collections::VecDeque<(SessionId, SessionGeneration, SessionReply)>,
}

impl Stream {
    async fn open(address: &str) -> Self {
        let channel = client::endpoint(address).unwrap().connect().await.unwrap();
        let (ops, outgoing) = mpsc::channel(16);
        let replies =
            client::reward(channel).exchange(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
        Self { ops, replies, read: std::collections::VecDeque::new() }
    }

    async fn send(&self, session: u64, generation: u32, op: SessionOp) {
        let op = op_to_wire(SessionId(session), SessionGeneration(generation), op);
        self.ops.send(pb::RewardRequest { ops: vec![op], lane: None }).await.unwrap();
    }

    /// The next reply of any session; `None` after a silence.
    async fn next(&mut self) -> Option<(u64, u32, SessionReply)> {
        loop {
            if let Some((session, generation, reply)) = self.read.pop_front() {
                return Some((session.0, generation.0, reply));
            }
            let message = tokio::time::timeout(SILENCE, self.replies.message()).await.ok()?;
            for reply in message.unwrap().expect("the stream goes on").replies {
                let (session, generation, reply) = reply_from_wire(reply);
                self.read.push_back((session, generation, reply.unwrap().unwrap()));
            }
        }
    }

    /// The next row, after however long a prefill takes.
    async fn row(&mut self) -> (u64, u32, SessionRow) {
        for _ in 0..100 {
            if let Some((session, generation, SessionReply::Row(row))) = self.next().await {
                return (session, generation, row);
            }
        }
        panic!("no row");
    }

    async fn failure(&mut self) -> Failure {
        for _ in 0..100 {
            if let Some((_, _, SessionReply::Failure(failure))) = self.next().await {
                return failure;
            }
        }
        panic!("no failure");
    }
}

fn open(member: &Member, answer: Vec<u32>) -> Open {
    Open {
        reward: "positive".into(),
        preference: Vec::new(),
        input: Input::Chat(vec![ChatMessage { role: "user".into(), content: "Hello".into() }]),
        answer,
        list_length: 8,
        priority: Priority::Normal,
        tokenizer: member.tokenizer,
        vocabulary: member.vocabulary,
        seed: 1,
        choice: 0,
        answer_tokens_max: 32,
        noise_scale: 0.0,
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        strength: 1.0,
        base_strength: 1.0,
        tenant: 0,
        pace: SessionPace::default(),
        wants_normalizer: true,
    }
}

fn another_tokenizer() -> TokenizerFingerprint {
    TokenizerFingerprint { core: [7; 32], core_tokens: 32_000, full: [8; 32] }
}

fn advance(position: u32, id: u32) -> SessionOp {
    SessionOp::Advance(Advance { position, ids: vec![id], branch: 0, chosen: position + 1 })
}

#[tokio::test(flavor = "multi_thread")]
async fn late_repeated_and_impossible_messages_harm_nobody() {
    let _machine = machine();
    let worker = Running::start("reward", &[&["--model", demo_model()], &PROMPTED[..]].concat());
    let channel = client::endpoint(&worker.address).unwrap().connect().await.unwrap();
    let described = client::membership(channel).describe(pb::DescribeRequest {}).await.unwrap();
    let member = Member::try_from(described.into_inner()).unwrap();
    let mut stream = Stream::open(&worker.address).await;
    let fresh = |answer| SessionOp::Open(Box::new(open(&member, answer)));

    // The well-behaved course of a session, as the measure of all that follows.
    stream.send(1, 0, fresh(vec![])).await;
    let (session, generation, first) = stream.row().await;
    assert_eq!((session, generation, first.position, first.ids.len()), (1, 0, 0, 8));
    let best = first.ids[0];
    stream.send(1, 0, advance(0, best)).await;
    let second = stream.row().await.2;
    assert_eq!(second.position, 1);

    // Repeated, late, and from the future: silence.
    stream.send(1, 0, fresh(vec![])).await;
    stream.send(1, 0, advance(0, best)).await;
    stream.send(1, 0, advance(7, best)).await;
    stream.send(1, 5, advance(1, best)).await;
    stream.send(99, 0, advance(0, best)).await;
    stream.send(99, 0, SessionOp::Close).await;
    stream.send(1, 0, SessionOp::Query { position: 0, ids: vec![1] }).await;
    assert_eq!(stream.next().await, None);

    // The session is where it was.
    stream.send(1, 0, SessionOp::Query { position: 1, ids: vec![second.ids[3], u32::MAX] }).await;
    let Some((1, 0, SessionReply::Answer(answer))) = stream.next().await else { panic!("no answer") };
    assert_eq!(answer.values, [second.values[3], f32::NEG_INFINITY]);

    // Opened again elsewhere with the answer so far: the same row, bit for bit.
    let mut elsewhere = Stream::open(&worker.address).await;
    elsewhere.send(1, 3, fresh(vec![best])).await;
    let (_, generation, again) = elsewhere.row().await;
    assert_eq!((generation, &again), (3, &second));

    // What can never succeed is refused in band, with its field; the others go on.
    let refused = |change: fn(&mut Open)| {
        let mut open = open(&member, vec![]);
        change(&mut open);
        SessionOp::Open(Box::new(open))
    };
    let cases: [(&str, SessionOp); 5] = [
        ("guidance.reward", refused(|open| open.tokenizer = Some(another_tokenizer()))),
        ("guidance.reward", refused(|open| open.reward = "nobody".into())),
        ("guidance.preference", refused(|open| open.preference = vec![("sad".into(), 1.0)])),
        ("open.answer", refused(|open| open.answer = vec![u32::MAX])),
        ("input", refused(|open| open.input = Input::Prompt("word ".repeat(20_000)))),
    ];
    for (number, (field, op)) in cases.into_iter().enumerate() {
        stream.send(100 + number as u64, 0, op).await;
        let failure = stream.failure().await;
        assert_eq!(
            (failure.code, failure.field.as_str()),
            (FailureCode::InvalidArgument, field),
            "{failure:?}"
        );
    }
    stream.send(1, 0, advance(1, second.ids[0])).await;
    assert_eq!(stream.row().await.2.position, 2);

    // An impossible token ends its own session only; a stream that is dropped takes its sessions along.
    stream.send(1, 0, advance(2, u32::MAX)).await;
    assert_eq!(stream.failure().await.code, FailureCode::InvalidArgument);
    assert_eq!(worker.metric("uniarm_reward_sessions"), 1.0);
    drop(elsewhere);
    for _ in 0..100 {
        if worker.metric("uniarm_reward_sessions") == 0.0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("a dropped stream leaves its sessions");
}
