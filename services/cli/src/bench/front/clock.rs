//! A base worker whose tokens are the time.

use std::{
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{Stream, StreamExt as _, stream};
use tonic::{Request, Response, Status};
use uniarm_proto::{
    BaseModel, Generation, Member, MemberId, Refusal, Role,
    pb::{
        self,
        base_server::{Base, BaseServer},
        generate_response::Event,
        membership_server::{Membership, MembershipServer},
    },
};
use uniarm_runtime::{
    Readiness, Shutdown,
    grpc::{GrpcOptions, GrpcServer},
};

pub const MODEL: &str = "clock";

/// Above all streams that may be asked for.
const CAPACITY: u32 = 100_000;

/// The worker, until it is dropped.
pub struct Clock {
    pub address: String,
    pub generation: Generation,
    begin: Instant,
    shutdown: Shutdown,
}

#[derive(Clone)]
struct Service {
    member: Arc<Member>,
    begin: Instant,
    interval: Duration,
}

// === impl Clock ===

impl Clock {
    pub async fn start(interval: Duration) -> anyhow::Result<Self> {
        let readiness = Readiness::starting();
        let options = GrpcOptions { streams_max: CAPACITY, ..GrpcOptions::default() };
        let server = GrpcServer::bind("127.0.0.1:0", options, readiness.clone()).await?;
        let address = server.local_addr().to_string();
        let member = Member {
            id: MemberId(MODEL.to_owned()),
            generation: Generation(1),
            role: Role::Base,
            address: address.clone(),
            tokenizer: None,
            vocabulary: 0,
            capacity: CAPACITY,
            base_model: Some(BaseModel {
                name: MODEL.to_owned(),
                context_tokens: CAPACITY,
                vocabulary: 0,
                has_chat_template: true,
            }),
            reward_models: Vec::new(),
            group: String::new(),
            rank: 0,
            size: 1,
            adapter_faults: Vec::new(),
        };
        let (begin, shutdown) = (Instant::now(), Shutdown::new());
        let generation = member.generation;
        let service = Service { member: Arc::new(member), begin, interval };
        let server =
            server.add_service(BaseServer::new(service.clone())).add_service(MembershipServer::new(service));
        readiness.set_ready();
        tokio::spawn(server.serve(shutdown.clone()));
        Ok(Self { address, generation, begin, shutdown })
    }

    /// How long a token with this text was on its way.
    pub fn since(&self, text: &str) -> Option<Duration> {
        let sent = Duration::from_nanos(text.trim().parse().ok()?);
        Some(self.begin.elapsed().saturating_sub(sent))
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.shutdown.begin();
    }
}

// === impl Service ===

#[tonic::async_trait]
impl Base for Service {
    type RunStream = Pin<Box<dyn Stream<Item = Result<pb::GenerateResponse, Status>> + Send>>;

    async fn run(&self, request: Request<pb::RunRequest>) -> Result<Response<Self::RunStream>, Status> {
        let asked = request.into_inner().request.and_then(|request| request.sampling);
        let count = asked.and_then(|sampling| sampling.max_tokens).unwrap_or(0);
        if count == 0 {
            return Err(Refusal::invalid("sampling.max_tokens", "a clock ends only where it is told").into());
        }
        let (begin, interval, first) = (self.begin, self.interval, tokio::time::Instant::now());
        let tokens = stream::iter(0..count).then(move |position| async move {
            tokio::time::sleep_until(first + interval * position).await;
            let text = format!("{} ", begin.elapsed().as_nanos());
            Event::Tokens(pb::Tokens { position, ids: vec![position], text, ..pb::Tokens::default() })
        });
        let started = Event::Started(pb::Started { model: MODEL.to_owned(), ..pb::Started::default() });
        let finished = Event::Finished(pb::Finished {
            reason: pb::FinishReason::Length as i32,
            completion_tokens: count,
            ..pb::Finished::default()
        });
        let events = stream::iter([started])
            .chain(tokens)
            .chain(stream::iter([finished, Event::Summary(pb::Summary::default())]));
        Ok(Response::new(Box::pin(events.map(|event| Ok(pb::GenerateResponse { event: Some(event) })))))
    }
}

#[tonic::async_trait]
impl Membership for Service {
    async fn describe(&self, _: Request<pb::DescribeRequest>) -> Result<Response<pb::Member>, Status> {
        Ok(Response::new(Member::clone(&self.member).into()))
    }
}
