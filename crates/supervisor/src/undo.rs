//! The undo stack of a creation: each step leaves what takes it back.

use std::future::Future;
use std::pin::Pin;

use crate::Error;

type Step = Pin<Box<dyn Future<Output = Result<(), Error>> + Send>>;

/// Steps to take back, run in reverse; all run, also after one failed.
#[derive(Default)]
pub struct Undo {
    steps: Vec<(&'static str, Step)>,
}

impl Undo {
    pub fn push(
        &mut self,
        name: &'static str,
        step: impl Future<Output = Result<(), Error>> + Send + 'static,
    ) {
        self.steps.push((name, Box::pin(step)));
    }

    /// Takes everything back; returns the errors of steps that failed, named.
    pub async fn run(self) -> Result<(), String> {
        let mut failed = Vec::new();
        for (name, step) in self.steps.into_iter().rev() {
            if let Err(error) = step.await {
                failed.push(format!("{name}: {error}"));
            }
        }
        if failed.is_empty() {
            Ok(())
        } else {
            Err(failed.join("; "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[tokio::test]
    async fn all_steps_run_in_reverse_and_every_error_is_kept() {
        let ran = Arc::new(Mutex::new(Vec::new()));
        let mut undo = Undo::default();
        for (name, ok) in [("first", true), ("second", false), ("third", false)] {
            let ran = Arc::clone(&ran);
            undo.push(name, async move {
                ran.lock().unwrap().push(name);
                if ok {
                    Ok(())
                } else {
                    Err(Error::internal("step", "broken"))
                }
            });
        }
        let error = undo.run().await.unwrap_err();
        assert_eq!(*ran.lock().unwrap(), ["third", "second", "first"]);
        assert_eq!(error, "third: step: broken; second: step: broken");
    }
}
