//! A TCP link between a store and etcd that can be cut and mended while both ends stay as they are.

use std::net::SocketAddr;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Forwards connections to `target` while it is whole; a cut closes them and refuses new ones.
pub struct Link {
    address: SocketAddr,
    whole: watch::Sender<bool>,
}

impl Link {
    pub async fn to(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let whole = watch::Sender::new(true);
        let mut cuts = whole.subscribe();
        tokio::spawn(async move {
            loop {
                let Ok((near, _)) = listener.accept().await else { return };
                if *cuts.borrow_and_update() {
                    tokio::spawn(forward(near, target.clone(), cuts.clone()));
                }
            }
        });
        Self { address, whole }
    }

    /// host:port of the near end.
    pub fn endpoint(&self) -> String {
        self.address.to_string()
    }

    pub fn cut(&self) {
        self.whole.send_replace(false);
    }

    pub fn mend(&self) {
        self.whole.send_replace(true);
    }
}

async fn forward(mut near: TcpStream, target: String, mut cuts: watch::Receiver<bool>) {
    let Ok(mut far) = TcpStream::connect(target).await else { return };
    tokio::select! {
        _ = copy_bidirectional(&mut near, &mut far) => {}
        _ = cuts.wait_for(|whole| !whole) => {}
    }
}
