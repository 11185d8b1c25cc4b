//! A web service that works on one order at a time, whichever of its instances gets the request, and that ends with no
//! lock left behind.
//!
//!     cargo run -p tenure-recipes --example orders
//!     curl -X POST localhost:3000/orders/42/pay
//!
//! Stop it with Ctrl-C: it answers what it has begun, and releases its locks.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::post;
use tenure::{Error, Locker};
use tokio::net::TcpListener;
use tokio::time::sleep;

#[derive(Clone)]
struct Shop {
    locker: Locker,
    /// In place of a database: how often each order was charged.
    charged: Arc<Mutex<BTreeMap<u64, u32>>>,
}

type Refusal = (StatusCode, String);

/// `POST /orders/{order}/pay`
///
/// If the client goes away, axum drops this future, and the guard with it: the lock is released in the background.
async fn pay(State(shop): State<Shop>, Path(order): Path<u64>) -> Result<String, Refusal> {
    let key = format!("order:{order}");
    // Shorter than the patience of the client.
    let guard = shop.locker.lock(key).wait_at_most(Duration::from_secs(5)).await.map_err(refusal)?;
    let reply = guard.protect(shop.charge(order)).await.map_err(|loss| refusal(loss.into()))?;
    guard.release().await.map_err(refusal)?;
    Ok(reply)
}

fn refusal(error: Error) -> Refusal {
    let status = match error {
        Error::NotObtained { .. } => StatusCode::CONFLICT,
        // The lock was lost, or the server can't be reached: the client may try again.
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    (status, error.to_string())
}

impl Shop {
    /// Charges an order that wasn't charged yet. Two of these at once would charge it twice.
    async fn charge(&self, order: u64) -> String {
        let is_charged = self.charged().contains_key(&order);
        if is_charged {
            return format!("order {order} was paid before\n");
        }
        sleep(Duration::from_millis(50)).await; // the bank
        *self.charged().entry(order).or_default() += 1;
        format!("order {order} is paid\n")
    }

    fn charged(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, u32>> {
        self.charged.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves until `stop` is done. Then answers what has begun, and returns how many locks it had to leave.
async fn serve(shop: Shop, listener: TcpListener, stop: impl Future<Output = ()> + Send + 'static) -> usize {
    let locker = shop.locker.clone();
    let service = Router::new().route("/orders/{order}/pay", post(pay)).with_state(shop);
    if let Err(error) = axum::serve(listener, service).with_graceful_shutdown(stop).await {
        eprintln!("could not serve: {error}");
    }
    // Together with the above, less than the time that the supervisor grants.
    locker.close_within(Duration::from_secs(5)).await
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let locker = Locker::in_memory(); // or Locker::connect("redis://127.0.0.1:6379").await?
    let shop = Shop { locker, charged: Arc::default() };
    let listener = TcpListener::bind("127.0.0.1:3000").await?;
    println!("listening on {}", listener.local_addr()?);
    let stop = async {
        if let Err(error) = tokio::signal::ctrl_c().await {
            eprintln!("no Ctrl-C here: {error}");
        }
    };
    let left = serve(shop, listener, stop).await;
    println!("{left} locks are left to their ttl");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::sync::oneshot;

    use super::*;

    async fn post_pay(address: SocketAddr, order: u64) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("POST /orders/{order}/pay HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        reply
    }

    /// Two instances of the service, which share nothing but the locker's store and the database.
    #[tokio::test]
    async fn an_order_is_charged_once_and_no_lock_is_left() {
        let shop = Shop { locker: Locker::in_memory(), charged: Arc::default() };
        let mut instances = Vec::new();
        for _ in 0..2 {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let (address, (stop, stopped)) = (listener.local_addr().unwrap(), oneshot::channel::<()>());
            let stopped = async { drop(stopped.await) };
            instances.push((address, stop, tokio::spawn(serve(shop.clone(), listener, stopped))));
        }
        let requests = (0..20).map(|i| tokio::spawn(post_pay(instances[i % 2].0, i as u64 % 4)));
        let mut paid = 0;
        for request in requests.collect::<Vec<_>>() {
            let reply = request.await.unwrap();
            assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
            paid += u32::from(reply.contains("is paid"));
        }
        assert_eq!((paid, shop.charged().clone()), (4, (0..4).map(|order| (order, 1)).collect()));
        for (_, stop, instance) in instances {
            stop.send(()).unwrap();
            assert_eq!(instance.await.unwrap(), 0);
        }
    }

    #[tokio::test]
    async fn an_order_that_another_works_on_is_a_conflict() {
        let shop = Shop { locker: Locker::in_memory(), charged: Arc::default() };
        let other = shop.locker.lock("order:1").await.unwrap();
        tokio::time::pause();
        let (status, text) = pay(State(shop), Path(1)).await.unwrap_err();
        assert_eq!(status, StatusCode::CONFLICT);
        assert!(text.contains("held by another"), "{text}");
        drop(other);
    }
}
