//! The gRPC server over real connections: health, reflection, and how it ends.

#![allow(clippy::unwrap_used)]

use std::pin::Pin;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Code, Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::{v1, v1alpha};
use uniarm_proto::pb::inference_server::{Inference, InferenceServer};
use uniarm_proto::{client, pb};
use uniarm_runtime::grpc::{GrpcOptions, GrpcServer};
use uniarm_runtime::{Readiness, RuntimeError, Shutdown};

const SERVICE: &str = "uniarm.v1.Inference";

/// Far above what any step takes, so that only a promise that is broken runs into it.
const PATIENCE: Duration = Duration::from_secs(10);

const PREFACE_TIMEOUT: Duration = Duration::from_millis(500);

/// Sends an event now and then, until nobody listens.
struct Endless;

#[tokio::test(flavor = "multi_thread")]
async fn health_follows_the_readiness_of_the_role() {
    let server = Running::start(Duration::ZERO).await;
    let mut health = HealthClient::new(server.dial());
    let status_of = async |health: &mut HealthClient<_>, service: &str| {
        let request = HealthCheckRequest { service: service.to_owned() };
        health.check(request).await.map(|answer| answer.into_inner().status())
    };
    for service in ["", SERVICE] {
        assert_eq!(status_of(&mut health, service).await.unwrap(), ServingStatus::NotServing, "{service:?}");
    }
    let unknown = status_of(&mut health, "uniarm.v1.Reward").await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound, "this server serves no rewards");

    let request = HealthCheckRequest { service: SERVICE.to_owned() };
    let mut watched = health.watch(request).await.unwrap().into_inner();
    assert_eq!(watched.next().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    server.readiness.set_ready();
    assert_eq!(watched.next().await.unwrap().unwrap().status(), ServingStatus::Serving);
    server.readiness.set_not_ready("loading another model");
    assert_eq!(watched.next().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_does_not_begin_to_speak_is_dropped_and_others_are_not() {
    let server = Running::start(Duration::ZERO).await;
    let mut stream = generate(&server).await;
    let mut silent = TcpStream::connect(&server.address).await.unwrap();
    let mut dawdler = TcpStream::connect(&server.address).await.unwrap();
    let dawdling = async {
        // A byte now and then does not buy time.
        for byte in b"PRI * HTTP/2.0" {
            if dawdler.write_all(&[*byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(PREFACE_TIMEOUT / 10).await;
        }
        // A reset is an end too.
        let _ = dawdler.read_to_end(&mut Vec::new()).await;
    };
    let _ = tokio::time::timeout(PATIENCE, silent.read_to_end(&mut Vec::new())).await.expect("it is dropped");
    tokio::time::timeout(PATIENCE, dawdling).await.expect("it is dropped");
    for _ in 0..10 {
        stream.next().await.unwrap().unwrap();
    }
    drop(stream);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_of_both_versions_lists_what_is_served_and_describes_it() {
    let server = Running::start(Duration::ZERO).await;
    let served = ["grpc.health.v1.Health", SERVICE];

    let ask = |message_request| v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(message_request),
    };
    let mut answers = v1::server_reflection_client::ServerReflectionClient::new(server.dial())
        .server_reflection_info(tokio_stream::iter([
            ask(v1::server_reflection_request::MessageRequest::ListServices(String::new())),
            ask(v1::server_reflection_request::MessageRequest::FileContainingSymbol(SERVICE.to_owned())),
        ]))
        .await
        .unwrap()
        .into_inner();
    let listed = answers.next().await.unwrap().unwrap().message_response.unwrap();
    let v1::server_reflection_response::MessageResponse::ListServicesResponse(listed) = listed else {
        panic!("{listed:?}");
    };
    let mut names: Vec<_> = listed.service.into_iter().map(|service| service.name).collect();
    names.sort();
    assert_eq!(names, served);
    let described = answers.next().await.unwrap().unwrap().message_response.unwrap();
    assert!(
        matches!(&described, v1::server_reflection_response::MessageResponse::FileDescriptorResponse(files)
            if !files.file_descriptor_proto.is_empty()),
        "{described:?}"
    );

    let list = v1alpha::server_reflection_request::MessageRequest::ListServices(String::new());
    let request = v1alpha::ServerReflectionRequest { host: String::new(), message_request: Some(list) };
    let mut answers = v1alpha::server_reflection_client::ServerReflectionClient::new(server.dial())
        .server_reflection_info(tokio_stream::iter([request]))
        .await
        .unwrap()
        .into_inner();
    assert!(answers.next().await.unwrap().unwrap().message_response.is_some(), "older clients ask v1alpha");
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_lets_calls_end_and_takes_no_new_ones() {
    let server = Running::start(PATIENCE).await;
    server.readiness.set_ready();
    let mut stream = generate(&server).await;
    stream.next().await.unwrap().unwrap();
    let mut health = HealthClient::new(server.dial());
    let mut watched = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(watched.next().await.unwrap().unwrap().status(), ServingStatus::Serving);

    server.shutdown.begin();

    assert_eq!(watched.next().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    drop((watched, health));
    for _ in 0..3 {
        stream.next().await.unwrap().unwrap();
    }
    let refused = client::inference(server.dial()).generate(pb::GenerateRequest::default()).await.err();
    assert_eq!(refused.expect("the port is closed").code(), Code::Unavailable);
    assert!(!server.serving.is_finished(), "a call is under way");
    drop(stream);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_outlive_the_drain_are_cut() {
    let drain = Duration::from_millis(300);
    let server = Running::start(drain).await;
    let mut stream = generate(&server).await;
    stream.next().await.unwrap().unwrap();

    let begun = Instant::now();
    server.shutdown.begin();
    let end = loop {
        match stream.next().await {
            Some(Ok(_)) => {}
            end => break end,
        }
    };

    assert!(begun.elapsed() >= drain, "not before its time");
    assert!(matches!(end, Some(Err(_)) | None), "{end:?}");
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_has_its_port_before_it_serves_and_nobody_else_gets_it() {
    let options = GrpcOptions::default();
    let first = GrpcServer::bind("127.0.0.1:0", options.clone(), Readiness::starting()).await.unwrap();
    let address = first.local_addr().to_string();
    assert!(!address.ends_with(":0"));

    let refused = GrpcServer::bind(&address, options, Readiness::starting()).await.err().unwrap();
    assert!(
        matches!(refused, RuntimeError::Bind { .. }) && refused.to_string().contains(&address),
        "{refused}"
    );
}

/// A server under test.
struct Running {
    address: String,
    readiness: Readiness,
    shutdown: Shutdown,
    serving: JoinHandle<Result<(), RuntimeError>>,
}

impl Running {
    async fn start(drain: Duration) -> Self {
        let (readiness, shutdown) = (Readiness::starting(), Shutdown::new());
        let options = GrpcOptions { drain, preface_timeout: PREFACE_TIMEOUT, ..GrpcOptions::default() };
        let server = GrpcServer::bind("127.0.0.1:0", options, readiness.clone())
            .await
            .unwrap()
            .add_service(InferenceServer::new(Endless))
            .add_descriptors(uniarm_proto::FILE_DESCRIPTOR_SET);
        let address = server.local_addr().to_string();
        let serving = tokio::spawn(server.serve(shutdown.clone()));
        Self { address, readiness, shutdown, serving }
    }

    fn dial(&self) -> tonic::transport::Channel {
        client::endpoint(&self.address).unwrap().connect_lazy()
    }

    async fn end(self) {
        self.shutdown.begin();
        let ended = tokio::time::timeout(PATIENCE, self.serving).await;
        ended.expect("no connection holds the server up").unwrap().unwrap();
    }
}

async fn generate(server: &Running) -> tonic::Streaming<pb::GenerateResponse> {
    client::inference(server.dial()).generate(pb::GenerateRequest::default()).await.unwrap().into_inner()
}

#[tonic::async_trait]
impl Inference for Endless {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<pb::GenerateResponse, Status>> + Send>>;

    async fn generate(
        &self,
        _: Request<pb::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let events = tokio_stream::iter(std::iter::repeat_with(|| Ok(pb::GenerateResponse::default()))).then(
            async |event| {
                tokio::time::sleep(Duration::from_millis(10)).await;
                event
            },
        );
        Ok(Response::new(Box::pin(events)))
    }

    async fn list_models(
        &self,
        _: Request<pb::ListModelsRequest>,
    ) -> Result<Response<pb::ListModelsResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
}
