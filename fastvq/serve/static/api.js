// Requests to the server. A failed one throws an Error whose message can be shown as it is.

const WAIT = 150; // milliseconds between two looks at a job

async function answer(response) {
  let body = {};
  try {
    body = await response.json();
  } catch {
    body = {};
  }
  if (!response.ok) throw new Error(body.error || `the server answered ${response.status}`);
  return body;
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer; is `fastvq edit --serve` still running?");
  }
  return answer(response);
}

export const get = (path) => request(path);

export const post = (path, body) => request(path, {
  method: "POST",
  body: body instanceof Blob ? body : JSON.stringify(body),
});

export const postNothing = (path) => request(path, { method: "POST" });

// Follows a job to its end. `watch` gets {state, progress, ahead} at every look; the result is the job's.
export async function finished({ job }, watch) {
  for (;;) {
    const now = await get(`/api/jobs/${job}`);
    watch({ ...now, job });
    if (now.state === "done") return now.result;
    if (now.state === "failed") throw new Error(now.error);
    if (now.state === "cancelled") return null;
    await new Promise((resolve) => setTimeout(resolve, WAIT));
  }
}
