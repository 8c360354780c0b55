//! A connection whose other end must take what is written to it within a time; without this, one that reads nothing would
//! hold its place for ever.

use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// A stream with a limit on how long a write may wait.
pub(crate) struct Stall<T> {
    inner: T,
    limit: Duration,
    waiting: Option<Pin<Box<Sleep>>>,
}

impl<T> Stall<T> {
    pub(crate) fn new(inner: T, limit: Duration) -> Self {
        Self { inner, limit, waiting: None }
    }

    /// Passes on what a write came to; one that waits too long fails.
    fn watched<R>(&mut self, cx: &mut Context, result: Poll<io::Result<R>>) -> Poll<io::Result<R>> {
        if result.is_ready() {
            self.waiting = None;
            return result;
        }
        let limit = self.limit;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(sleep(limit)));
        if waiting.deadline() <= Instant::now() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        ready!(waiting.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Stall<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context, buf: &mut ReadBuf) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Stall<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.watched(cx, result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_flush(cx);
        self.watched(cx, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.watched(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context,
        bufs: &[io::IoSlice],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.watched(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use tokio::net::{TcpListener, TcpStream};

    /// Writes up to 64 MiB to a peer that begins to read after `pause`, or never.
    async fn write(pause: Option<Duration>) -> io::Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let addr = listener.local_addr()?;
        let peer = std::thread::spawn(move || {
            let mut socket = std::net::TcpStream::connect(addr).unwrap();
            std::thread::sleep(pause.unwrap_or(Duration::from_secs(1)));
            let mut bytes = vec![0; 1 << 20];
            while pause.is_some() && socket.read(&mut bytes).unwrap_or(0) > 0 {}
        });
        let (socket, _) = listener.accept().await?;
        let mut stall: Stall<TcpStream> = Stall::new(socket, Duration::from_millis(400));
        let bytes = vec![1; 1 << 20];
        let mut result = Ok(());
        for _ in 0..64 {
            let done = std::future::poll_fn(|cx| Pin::new(&mut stall).poll_write(cx, &bytes)).await;
            result = result.and(done.map(drop));
        }
        drop(stall);
        peer.join().unwrap();
        result
    }

    #[test]
    fn a_write_that_nobody_takes_fails_and_one_that_is_taken_late_does_not() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            write(Some(Duration::from_millis(100))).await.unwrap();
            assert_eq!(write(None).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        });
    }
}
