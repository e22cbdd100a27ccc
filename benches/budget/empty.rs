//! The floor of the idle program: two threads that sleep, and nothing else. The bench compiles it.

fn main() {
    let sleeper = std::thread::spawn(|| loop {
        std::thread::park();
    });
    // Nobody wakes them.
    let _ = sleeper.join();
}
