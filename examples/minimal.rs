//! One lock around one piece of work.
//!
//!     cargo run --example minimal

use tenure::{Error, Locker};

#[tokio::main]
async fn main() -> Result<(), Error> {
    let locker = Locker::in_memory(); // or Locker::connect("redis://127.0.0.1:6379").await?
    let guard = locker.lock("invoices:42").await?; // waits for its turn, and is renewed from now on
    println!("working, with {:?} left until the next renewal must have succeeded", guard.remaining());
    guard.release().await
}
