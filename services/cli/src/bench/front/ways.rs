//! The ways by which a token comes to a client.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
};
use tonic::{Streaming, transport::Channel};
use uniarm_proto::{
    ChatMessage, GenerateRequest, Input, Sampling, client,
    pb::{self, generate_response::Event},
};

use super::{
    Heard,
    clock::{Clock, MODEL},
};
use crate::bench::args::Way;

/// Connections of each kind: clients of a router are many.
const CONNECTIONS: usize = 16;

const WORKER_PATIENCE: Duration = Duration::from_secs(20);
const ASK_EVERY: Duration = Duration::from_millis(50);

pub struct Caller<'a> {
    clock: &'a Clock,
    workers: Vec<Channel>,
    routers: Vec<Channel>,
    /// host:port
    http: String,
    tokens: usize,
}

// === impl Caller ===

impl<'a> Caller<'a> {
    pub fn new(clock: &'a Clock, router: &str, http: &str, tokens: usize) -> anyhow::Result<Self> {
        let channels = |address: &str| -> anyhow::Result<Vec<Channel>> {
            (0..CONNECTIONS).map(|_| Ok(client::endpoint(address)?.connect_lazy())).collect()
        };
        let (workers, routers) = (channels(&clock.address)?, channels(router)?);
        Ok(Self { clock, workers, routers, http: http.to_owned(), tokens })
    }

    /// Until the router knows its worker.
    pub async fn wait_for_worker(&self) -> anyhow::Result<()> {
        let mut inference = client::inference(self.routers[0].clone());
        let began = Instant::now();
        while began.elapsed() < WORKER_PATIENCE {
            let served = inference.list_models(pb::ListModelsRequest {}).await;
            if served.is_ok_and(|served| !served.into_inner().base_models.is_empty()) {
                return Ok(());
            }
            tokio::time::sleep(ASK_EVERY).await;
        }
        bail!("the router does not find its worker")
    }

    /// One stream, from its request to its end.
    pub async fn listen(&self, way: Way, index: usize) -> anyhow::Result<Heard> {
        let began = Instant::now();
        match way {
            Way::Direct => {
                let request = pb::RunRequest {
                    request: Some(self.request()),
                    generation: self.clock.generation.0,
                    ..pb::RunRequest::default()
                };
                let mut worker = client::base(self.workers[index % CONNECTIONS].clone());
                self.follow(began, worker.run(request).await?.into_inner()).await
            }
            Way::Grpc => {
                let mut router = client::inference(self.routers[index % CONNECTIONS].clone());
                self.follow(began, router.generate(self.request()).await?.into_inner()).await
            }
            Way::Http => self.follow_http(began).await,
        }
    }

    fn request(&self) -> pb::GenerateRequest {
        let message = ChatMessage { role: "user".to_owned(), content: "What time is it?".to_owned() };
        let sampling = Sampling { max_tokens: self.tokens as u32, ..Sampling::default() };
        GenerateRequest { sampling, ..GenerateRequest::new(Input::Chat(vec![message])) }.into()
    }

    async fn follow(
        &self,
        began: Instant,
        mut events: Streaming<pb::GenerateResponse>,
    ) -> anyhow::Result<Heard> {
        let mut heard = Heard { first: Duration::ZERO, under_way: Vec::with_capacity(self.tokens) };
        while let Some(response) = events.message().await? {
            if let Some(Event::Tokens(tokens)) = response.event {
                self.hear(&mut heard, began, &tokens.text)?;
            }
        }
        self.whole(heard)
    }

    /// Server-sent events, a line each.
    async fn follow_http(&self, began: Instant) -> anyhow::Result<Heard> {
        let body = format!(
            "{{\"model\":\"{MODEL}\",\"messages\":[{{\"role\":\"user\",\"content\":\"What time is it?\"}}],\
             \"max_tokens\":{},\"stream\":true}}",
            self.tokens
        );
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            self.http,
            body.len()
        );
        let mut connection = TcpStream::connect(&self.http).await?;
        connection.set_nodelay(true)?;
        connection.write_all((head + &body).as_bytes()).await?;
        let mut heard = Heard { first: Duration::ZERO, under_way: Vec::with_capacity(self.tokens) };
        let mut lines = BufReader::new(connection).lines();
        while let Some(line) = lines.next_line().await? {
            let Some(data) = line.strip_prefix("data: ") else { continue };
            if data == "[DONE]" {
                return self.whole(heard);
            }
            let event: serde_json::Value = serde_json::from_str(data)?;
            match event["choices"][0]["delta"]["content"].as_str() {
                None | Some("") => {}
                Some(text) => self.hear(&mut heard, began, text)?,
            }
        }
        bail!("the answer ended early")
    }

    fn hear(&self, heard: &mut Heard, began: Instant, text: &str) -> anyhow::Result<()> {
        if heard.under_way.is_empty() {
            heard.first = began.elapsed();
        }
        // Tokens that were held up may come as one text.
        for token in text.split_whitespace() {
            heard.under_way.push(self.clock.since(token).with_context(|| format!("{token:?} is no time"))?);
        }
        Ok(())
    }

    fn whole(&self, heard: Heard) -> anyhow::Result<Heard> {
        let (said, all) = (heard.under_way.len(), self.tokens);
        anyhow::ensure!(said == all, "{said} of {all} tokens came");
        Ok(heard)
    }
}
