//! The floor of the idle program: two threads that sleep. The bench compiles it.

fn main() {
    let sleeper = std::thread::spawn(|| loop {
        std::thread::park();
    });
    // No thread wakes them.
    let _ = sleeper.join();
}
