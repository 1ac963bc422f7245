//! What the guest serves, with nothing before it.

use dormouse_agent_proto::Target;
use dormouse_mux::{Agent, both_ways};
use tokio::net::UnixListener;

/// The guest's own socket, as clients of this one see it: no relay, no lease, no sleep.
pub async fn serve(listener: UnixListener, agent: Agent, target: Target) {
    while let Ok((mut client, _)) = listener.accept().await {
        let (agent, target) = (agent.for_client(), target.clone());
        tokio::spawn(async move {
            if let Ok(mut engine) = agent.dial(target).await {
                both_ways(&mut client, &mut engine).await;
            }
        });
    }
}
