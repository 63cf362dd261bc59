"""The server: the OpenAI protocol over engines that live in processes of their own.

One page to hold the whole in your head; who writes a plugin for the server reads it here.

    HTTP worker (this process)                                    engine process, one a replica
    routes -> text.* (templates, ids) -> front.fleet.Fleet  ==zmq, msgspec==>  worker.EngineLoop -> engine.Engine
           <- text.stream (text, stops)  <- Delta           <==============    one message a step

**The front holds everything, the engine process nothing.** A `front.sequence.Sequence` is one output that a call waits
for: prompt ids, `SamplingParams`, seed, deadline, the tokens so far, their text, and the deltas that are not read
yet. The `Fleet` places it on a replica, and when that replica dies places it again, to go on from its next token.
Tokenising, detokenising, stop strings, tool calls and HTTP are the front's; the engine process sees ids alone.

**A call** is a `generation.Call`; each generating route has its own kind, which makes prompts of the body and an answer
of the pieces of text.

**The engines, as the routes see them,** are the methods of `front.fleet.Fleet`: `check_room`, `submit`, which puts each
`messages.Delta` into its sequence as it comes, `abort`, `abort_all`, `snapshot`, `close`. Engines on other machines fit
behind the same methods.

**The application.** `app.create_app(config, engine, text, stats)` makes the application. On `app.state` there are:

    app.state.config    config.ServerConfig, frozen
    app.state.engine    front.fleet.Fleet
    app.state.stats     stats.ServerStats: what happens, for metrics and the dashboard (below)
    app.state.text      text.model_text.ModelText: the tokenizer, chat templates, in threads and processes
    app.state.lifecycle lifecycle.Lifecycle: starting, ready, draining, stopped

After its own routes, `create_app` calls the hook `register_routes(app, config)` of every plugin once. `config` is the
ServerConfig; `config.paged` is the engine's PagedConfig. A plugin adds routes with `app.add_api_route` or
`app.include_router`, and may add start-up and clean-up work to `app.state.lifecycle.on_start` / `.on_stop` (lists of
callables, sync or async). API keys, request ids, the body limit, the check of JSON bodies (`bodies`) and error bodies
are middlewares around all routes, so a plugin's routes have them too: nothing more is needed to be behind the API key.

**What a plugin sees of the traffic.** `app.state.stats` (`stats.ServerStats`):

    stats.subscribe(listener)       an object with any of these methods; they run in the event loop, keep them short:
        request_started(record)     stats.RequestRecord, once its prompt is tokenised and it was accepted
        tokens(record, count, gap)  `count` new tokens, `gap` seconds after the ones before (None: first)
        request_finished(record)    with every time and count filled in, however it ended (`record.finish_reason`:
                                    stop, length, abort, error, deadline, queue_timeout, or refused: the engine
                                    turned it away before it ran)
        request_refused(reason)     a call was turned away before it began: queue_full, draining, not_ready, or by the
                                    engine, after request_started: invalid (a 400), rejected (by a plugin)
        engine_stats(stats)         messages.EngineStats of one replica, about 5 times a second while it works, and
                                    once a second idle; holds `steps`, a list of messages.StepRecord since the last
        engine_restarted(replica, why)
    stats.running / stats.waiting   RequestRecords by request id; in dicts that are the truth at this moment
    stats.engines                   the latest EngineStats of each replica, by its index
    stats.totals                    stats.Totals: counters since the server began, over all replicas and restarts
    stats.recent                    the last 1,000 finished RequestRecords, oldest first
    stats.watch_blocks(seconds)     ask the engines to send the `blocks` of each `messages.BlockGroup` in
                                    `EngineStats.groups` (request id -> block ids, shared blocks appear under several)
                                    for `seconds`; without a watcher they are not sent

A `RequestRecord` has the incoming W3C `traceparent` header and start and end times in `time.time_ns()`, which is what
spans need; `stats.RequestRecord`'s docstring lists all. Ids are the engine's own (`record.request_id`); the id that the
client sent or got is `record.client_id`.

**Structured output.** The constraint travels as `SamplingParams.structured_outputs`. The front makes it of
`response_format`, of vLLM's `structured_outputs`, and of `tool_choice` "required" or by name, and sends its fields; the
engine process builds the Request, has `plugins.constrain(manager, request, tokenizer)` give it its `constraint` in a
thread beside the step loop, and then adds it. What that raises as ConfigError or InvalidRequestError becomes a 400, and
the request ends as refused. A request that resumes after a crash comes with the tokens it had
(`Request(resume_from=...)`): the constraint finds them in `request.output_token_ids` when it is made, and has to take
them in.

**Refusals.** Raise `errors.APIError(status, message, param=…, code=…)` in a route: it becomes OpenAI's error body.
"""
