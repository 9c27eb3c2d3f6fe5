"""An HTTP server for one model, which speaks the APIs of OpenAI and Anthropic.

A request takes this way:

1. ``middleware.Guard`` checks Host, Origin, key and size. A route of ``app.ROUTES`` reads the body with ``calls.Call``.
2. The API's module validates the fields (``fields.Fields``) and translates them to a ``conversation.Conversation``:
   messages, tools, and options of ``Engine.request``. ``Service.prepare`` renders and tokenizes it in a separate
   thread, so that every permanent fault is answered with a status before the response begins. ``Call.answer`` queues
   it, or finds the answer in progress to the same request.
3. ``worker.Worker`` is the thread that owns the engine. It runs all sequences with one ``Scheduler``, and
``reading.AnswerReader``
   turns their tokens to events (``events.py``): ``Started``, ``Prefilled``, ``Reasoning``, ``Text``, ``CallStarted``,
   ``CallArguments``, ``CallEnded``, and at last ``Finished`` or ``Failed``. Nothing else takes an answer apart.
4. The response follows the events of the ``Answer``. ``Call.stream`` takes a ``streaming.StreamFormat`` with
``opening()`` (sent
   before the prompt is processed), ``frames(event)`` and ``ping()``. ``Call.whole`` takes a function from all events to
   the body. Both cancel the answer when the client goes.

To add an API: a module with a handler like ``openai_chat.chat_completions``, one line in ``app.ROUTES``, and, if its
errors have another form, an entry in ``errors.ERROR_FORMS``. HTTP needs the extra ``server``; ``task=batch`` works
without it and uses ``chat_json``, ``preparing`` and ``reading`` alone, which import neither starlette nor uvicorn.
"""
